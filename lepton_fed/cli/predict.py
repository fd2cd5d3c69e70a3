"""`lepton-fed predict`: a verified bundle on a file of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lepton_fed.cli.screen import AsJson, Overrides, guarded, print_json, stdout
from lepton_fed.errors import ConfError, Problem

_ENDINGS = {
    ".csv": "csv",
    ".npz": "npz",
    ".idx": "idx",
    ".idx.gz": "idx",
    "-ubyte": "idx",
    "-ubyte.gz": "idx",
}


def predict(
    bundle: Annotated[Path, typer.Option(help="The bundle's folder.")],
    file: Annotated[Path, typer.Option("--input", help="Rows to predict: CSV, NPZ or IDX.")],
    key: Annotated[Path, typer.Option(help="The coordinator's public key, as pinned.")] = Path(
        "keys/coordinator.pub"
    ),
    output: Annotated[Path, typer.Option(help="Where the predictions go, CSV.")] = Path(
        "predictions.csv"
    ),
    reader: Annotated[
        str, typer.Option(help="Name of the reader; taken from the file's name when left out.")
    ] = "",
    threads: Annotated[int, typer.Option(min=1, max=256, help="CPU threads.")] = 1,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Verify a bundle against the pinned key, then predict. Nothing unverified is parsed.

    The overrides are the reader's: arguments.delimiter=';' for a CSV file, say.
    """
    with guarded(as_json=as_json):
        from lepton_fed.config.load import load_values
        from lepton_fed.config.schema import Source
        from lepton_fed.export.bundle import verify_bundle
        from lepton_fed.export.keys import load_public_key
        from lepton_fed.export.predict import check_output, write_predictions
        from lepton_fed.export.predict import predict as predictions_of

        check_output(output, (file, bundle, key))
        verified = verify_bundle(bundle, load_public_key(key))
        named = reader or _reader_of(file)
        values = {"reader": named, "path": str(file)}
        loaded = load_values(Source, values, overrides or [], source="command line")
    with guarded(as_json=as_json, loaded=loaded):
        from lepton_fed.data.read import read

        rows = read(loaded.conf, verified.task.data, with_target=False, key="")
        predictions = predictions_of(verified, rows.inputs, threads=threads)
        write_predictions(predictions, output)
        if as_json:
            print_json(
                {
                    "rows": len(predictions),
                    "output": str(output),
                    "run": verified.manifest.run,
                    "version": verified.manifest.version,
                    "signer": verified.manifest.signer,
                }
            )
            return
        out = stdout()
        out.print(f"verified    version {verified.manifest.version} of run {verified.manifest.run}")
        out.print(f"predicted   {len(predictions)} rows -> {output}", markup=False)


def _reader_of(file: Path) -> str:
    from lepton_fed.config import plugins

    for ending, reader in _ENDINGS.items():
        if file.name.endswith(ending):
            return reader
    if file.is_dir():
        return "idx"
    raise ConfError(
        Problem("LF1203", "the file's name does not say which reader reads it", where=str(file),
                remedy=f"--reader and one of {', '.join(plugins.names('readers'))}")
    )  # fmt: skip
