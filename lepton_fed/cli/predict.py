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
    file: Annotated[Path, typer.Option("--input", help="Rows to predict: CSV, NPZ or IDX.")],
    bundle: Annotated[
        Path | None, typer.Option(help="The bundle's folder; or give --conf at a site.")
    ] = None,
    conf: Annotated[
        Path | None,
        typer.Option("--conf", help="The site's conf: its bundle in use and its pinned key."),
    ] = None,
    task: Annotated[
        str, typer.Option(help="With --conf: first digits of the task, where several are in use.")
    ] = "",
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
        from lepton_fed.export.predict import check_output, write_predictions
        from lepton_fed.export.predict import predict as predictions_of
        from lepton_fed.identity.keys import load_public_key

        folder, pinned = _in_use(conf, task) if conf else (bundle, key)
        if folder is None or (conf and bundle):
            raise ConfError(
                Problem("LF1206", "give one of --bundle and --conf",
                        remedy="--conf conf/client.yaml at a site, --bundle FOLDER elsewhere")
            )  # fmt: skip
        check_output(output, (file, folder, pinned))
        verified = verify_bundle(folder, load_public_key(pinned))
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


def _in_use(conf: Path, task: str) -> tuple[Path, Path]:
    """Return the bundle in use at a site, and the key that it pinned."""
    from lepton_fed.clients.bundles import BundleStore
    from lepton_fed.config.load import load_conf
    from lepton_fed.config.schema import ClientConf
    from lepton_fed.identity.keys import load_public_key

    site = load_conf(conf, [], kind=ClientConf).conf
    key = Path(site.coordinator_key)
    store = BundleStore(Path(site.state) / "bundles", load_public_key(key), site.policy)
    return store.in_force(task), key


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
