"""`python -m lepton_fed` is `lepton-fed`."""

from lepton_fed.cli import main

if __name__ == "__main__":
    main()
