"""`lepton-fed keys`: identities, certificates, and the roster that names who takes part."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lepton_fed.cli.screen import AsJson, Overrides, guarded, print_json, print_table, stdout

if TYPE_CHECKING:
    from lepton_fed.identity.roster import Roster

app = typer.Typer(
    help="Make keys, enrol sites, and compare fingerprints as words by phone.",
    no_args_is_help=True,
)

Out = Annotated[Path, typer.Option("--out", help="Folder for the keys.")]
RosterFile = Annotated[Path, typer.Option("--roster", help="The coordinator's roster.")]
SigningKey = Annotated[Path, typer.Option("--key", help="The coordinator's private key; signs.")]
_KEYS = Path("keys")
_ROSTER = Path("keys/roster.json")
_SIGNING = Path("keys/coordinator.pem")


@app.command("coordinator")
def coordinator(
    out: Out = _KEYS,
    host: Annotated[
        list[str] | None,
        typer.Option("--host", help="Name or address that sites reach it by; may be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make the coordinator's key, a TLS certificate under a trial authority, and an empty roster.

    Private keys stay here. Sites get coordinator.pub, tls/ca.crt and roster.json.
    """
    with guarded(as_json=as_json):
        from lepton_fed.identity.certificates import make_certificates
        from lepton_fed.identity.keys import generate_key, load_private_key
        from lepton_fed.identity.roster import Roster, write_roster
        from lepton_fed.identity.words import key_words

        path = out / "coordinator.pem"
        if not path.exists():  # `lepton-fed init` may have made it
            generate_key(path)
        key = load_private_key(path)
        make_certificates(out / "tls", host or [])
        roster = out / "roster.json"
        if not roster.exists():
            public = key.public_key().public_bytes_raw().hex()
            write_roster(roster, Roster(1, public, [], ""), key)
        _tell(
            as_json,
            {"coordinator": key_words(key.public_key())},
            for_sites=[path.with_suffix(".pub"), out / "tls" / "ca.crt", roster],
            following="each site runs `lepton-fed keys site NAME` and sends NAME.enrol.json; then "
            "`lepton-fed keys enrol NAME.enrol.json`",
        )


@app.command("certificate")
def certificate(
    out: Annotated[Path, typer.Option("--out", help="Folder for the new pair.")] = (
        _KEYS / "tls-next"
    ),
    authority: Annotated[
        Path, typer.Option("--authority", help="Folder with ca.crt, ca.key and server.crt.")
    ] = _KEYS / "tls",
    host: Annotated[
        list[str] | None,
        typer.Option("--host", help="Name or address; may be repeated. None: those of server.crt."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make the coordinator's next TLS certificate under the trial authority that it has.

    A running coordinator takes it as soon as both files are in the place of the old ones.
    """
    with guarded(as_json=as_json):
        from lepton_fed.identity.certificates import check_certificate, make_next_certificate

        hosts = make_next_certificate(authority, out, host or [])
        valid = check_certificate(out / "server.crt")
        if as_json:
            files = [str(out / "server.crt"), str(out / "server.key")]
            print_json({"files": files, "hosts": hosts, "valid": valid})
            return
        stdout().print(f"{out / 'server.crt'}  {valid}; for {', '.join(hosts)}", markup=False)
        stdout().print(
            f"\nnext: move both files of {out} to the place of the old ones; a running coordinator "
            "takes them by itself",
            markup=False,
        )


@app.command("site")
def site(
    name: Annotated[str, typer.Argument(help="Name of the site.")],
    out: Out = _KEYS,
    as_json: AsJson = False,
) -> None:
    """Make a site's two keys and the enrolment that it sends to the coordinator.

    The private halves stay here; only NAME.enrol.json is sent.
    """
    with guarded(as_json=as_json):
        from lepton_fed.config.rules import name_problem
        from lepton_fed.errors import ConfError
        from lepton_fed.identity.keys import generate_key, load_private_key, write_key_files
        from lepton_fed.identity.node_key import generate_node_key
        from lepton_fed.identity.roster import Member, enrolment_file
        from lepton_fed.identity.words import key_words

        wrong = name_problem(name, "NAME")
        if wrong is not None:
            raise ConfError(wrong)
        path = out / f"{name}.pem"
        public = generate_key(path)
        line = generate_node_key(out / f"{name}.node")
        wish = out / f"{name}.enrol.json"
        member = Member(name, public.public_bytes_raw().hex(), line)
        write_key_files({wish: (enrolment_file(member, load_private_key(path)), 0o644)})
        _tell(
            as_json,
            {name: key_words(public)},
            for_coordinator=[wish],
            following="send it to the coordinator, and compare these words by phone",
        )


@app.command("enrol")
def enrol(
    files: Annotated[list[Path], typer.Argument(help="Enrolments, as sites sent them.")],
    roster: RosterFile = _ROSTER,
    key: SigningKey = _SIGNING,
    as_json: AsJson = False,
) -> None:
    """Put sites on the roster and sign it anew; compare the words with each site by phone."""
    with guarded(as_json=as_json):
        from lepton_fed.identity.keys import load_private_key
        from lepton_fed.identity.roster import enrol as enrolled
        from lepton_fed.identity.roster import parse_enrolment, read_roster, write_roster

        private = load_private_key(key)
        old = new = read_roster(roster, private.public_key())
        for file in files:
            new = enrolled(new, parse_enrolment(file))
        write_roster(roster, new, private)
        _show_change(old, new, roster, as_json=as_json)


@app.command("remove")
def remove(
    name: Annotated[str, typer.Argument(help="Name of the site.")],
    roster: RosterFile = _ROSTER,
    key: SigningKey = _SIGNING,
    as_json: AsJson = False,
) -> None:
    """Take a site off the roster and sign it anew."""
    with guarded(as_json=as_json):
        from lepton_fed.identity.keys import load_private_key
        from lepton_fed.identity.roster import read_roster, write_roster
        from lepton_fed.identity.roster import remove as removed

        private = load_private_key(key)
        old = read_roster(roster, private.public_key())
        new = removed(old, name)
        write_roster(roster, new, private)
        _show_change(old, new, roster, as_json=as_json)


@app.command("show")
def show(
    file: Annotated[Path, typer.Argument(help="A public key, an enrolment, or a roster.")],
    key: Annotated[
        Path, typer.Option("--key", help="The coordinator's public key; a roster must carry it.")
    ] = Path("keys/coordinator.pub"),
    as_json: AsJson = False,
) -> None:
    """Print the words of a key, an enrolment, or every site on a roster."""
    with guarded(as_json=as_json):
        from lepton_fed.identity.keys import load_public_key
        from lepton_fed.identity.roster import parse_enrolment, read_roster
        from lepton_fed.identity.words import key_words

        if file.name.endswith(".enrol.json"):
            member = parse_enrolment(file)
            _words(as_json, {member.name: key_words(member.key)})
        elif file.suffix == ".json":
            found = read_roster(file, load_public_key(key))
            said = {member.name: key_words(member.key) for member in found.sites}
            if not as_json:
                stdout().print(f"roster version {found.version}, {len(found.sites)} sites")
            _words(as_json, said, version=found.version, digest=found.digest)
        else:
            _words(as_json, {file.stem: key_words(load_public_key(file))})


@app.command("accept")
def accept(
    overrides: Overrides = None,
    conf: Annotated[Path, typer.Option("--conf", help="The site's conf.")] = Path(
        "conf/client.yaml"
    ),
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """At a site: look at the changed roster that the coordinator sent, and take it."""
    with guarded(as_json=as_json):
        from lepton_fed.config.load import load_conf
        from lepton_fed.config.schema import ClientConf

        loaded = load_conf(conf, overrides or [], kind=ClientConf)
    with guarded(as_json=as_json, loaded=loaded):
        from lepton_fed.identity.keys import load_public_key
        from lepton_fed.identity.pinned import PinnedRoster
        from lepton_fed.identity.roster import changes

        site = loaded.conf
        pinned = PinnedRoster(
            Path(site.roster), Path(site.state), load_public_key(Path(site.coordinator_key)), False
        )
        offered = pinned.offered()
        if offered is not None and not as_json:
            for line in changes(pinned.current, offered):
                stdout().print(line, markup=False)
            if not yes:
                typer.confirm("compared the words by phone, and take it?", abort=True)
        changed = pinned.accept(offered)
        if as_json:
            print_json({"version": pinned.current.version, "changes": changed})
        else:
            stdout().print(f"roster version {pinned.current.version} is pinned")


def _tell(
    as_json: bool,
    words: dict[str, str],
    *,
    following: str,
    for_sites: list[Path] | None = None,
    for_coordinator: list[Path] | None = None,
) -> None:
    if as_json:
        print_json({"words": words, "send": [str(p) for p in for_sites or for_coordinator or []]})
        return
    _words(False, words)
    out = stdout()
    for path in for_sites or []:
        out.print(f"for sites         {path}", markup=False)
    for path in for_coordinator or []:
        out.print(f"for coordinator   {path}", markup=False)
    out.print(f"\nnext: {following}", markup=False)


def _words(as_json: bool, words: dict[str, str], **more: Any) -> None:
    if as_json:
        print_json({"words": words, **more})
    else:
        print_table(
            "", ["who", "words to compare"], [list(item) for item in words.items()], words=2
        )


def _show_change(old: Roster, new: Roster, path: Path, *, as_json: bool) -> None:
    from lepton_fed.identity.roster import changes

    if as_json:
        print_json({"version": new.version, "digest": new.digest, "changes": changes(old, new)})
        return
    out = stdout()
    for line in changes(old, new):
        out.print(line, markup=False)
    out.print(f"roster version {new.version}, {len(new.sites)} sites: {path}", markup=False)
    out.print(
        "\nnext: hand it to each site; those that have one are shown the change", markup=False
    )
