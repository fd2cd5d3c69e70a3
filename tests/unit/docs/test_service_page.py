"""docs/how-to/run-as-a-service.md: its unit files are ones that systemd takes."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest
from typer.main import get_command

from lepton_fed.cli import app

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "how-to" / "run-as-a-service.md").read_text()
UNITS = dict(re.findall(r"^```ini (\S+\.service)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))

YES = r"yes|no"
KNOWN = {
    "Unit": {
        "Description": r".+",
        "Wants": r"[\w.@-]+(?: [\w.@-]+)*",
        "After": r"[\w.@-]+(?: [\w.@-]+)*",
        "StartLimitIntervalSec": r"\d+",
    },
    "Service": {
        "Type": r"simple|exec|notify|forking|oneshot",
        "User": r"[a-z][a-z0-9-]*",
        "Group": r"[a-z][a-z0-9-]*",
        "WorkingDirectory": r"/.+",
        "ExecStart": r"/.+",
        "Restart": r"no|always|on-failure|on-abnormal|on-abort|on-success|on-watchdog",
        "RestartSec": r"\d+",
        "RestartPreventExitStatus": r"\d+(?: \d+)*",
        "KillMode": r"control-group|mixed|process|none",
        "TimeoutStopSec": r"\d+",
        "LimitNOFILE": r"\d+",
        "UMask": r"0[0-7]{3}",
        "NoNewPrivileges": YES,
        "CapabilityBoundingSet": r"|CAP_\w+(?: CAP_\w+)*",
        "ProtectSystem": r"yes|no|full|strict",
        "ReadWritePaths": r"/\S+(?: /\S+)*",
        "ProtectHome": r"yes|no|read-only|tmpfs",
        "PrivateTmp": YES,
        "ProtectKernelTunables": YES,
        "ProtectControlGroups": YES,
        "RestrictSUIDSGID": YES,
        "RestrictNamespaces": YES,
        "RestrictRealtime": YES,
        "LockPersonality": YES,
        "RestrictAddressFamilies": r"AF_[A-Z0-9]+(?: AF_[A-Z0-9]+)*",
        "SystemCallArchitectures": r"native",
    },
    "Install": {"WantedBy": r"[\w.-]+\.target"},
}
"""Sections, keys and values as systemd's manual has them (systemd.unit, .service, .exec, .kill)."""


def read(text: str) -> dict[str, dict[str, str]]:
    """Return sections, keys and values of a unit file; anything else than these is an error."""
    found: dict[str, dict[str, str]] = {}
    section = ""
    for line in text.splitlines():
        if not line:
            continue
        heading = re.fullmatch(r"\[(\w+)\]", line)
        if heading:
            section = heading[1]
            assert section in KNOWN, f"no such section: {line}"
            assert section not in found, f"twice: {line}"
            found[section] = {}
            continue
        setting = re.fullmatch(r"(\w+)=(.*)", line)
        assert setting, f"neither a section nor KEY=VALUE: {line!r}"
        key, value = setting.groups()
        assert section, f"before any section: {line}"
        assert key in KNOWN[section], f"[{section}] has no {key}"
        assert key not in found[section], f"twice: {line}"
        assert re.fullmatch(KNOWN[section][key], value), f"no value of {key}: {value!r}"
        found[section][key] = value
    return found


def test_the_page_has_both_units() -> None:
    assert list(UNITS) == ["lepton-fed-coordinator.service", "lepton-fed-site.service"]
    for name in UNITS:
        assert f"`/etc/systemd/system/{name}`:" in PAGE


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_is_strictly_well_formed_and_keeps_its_service_up(name: str) -> None:
    unit = read(UNITS[name])
    assert list(unit) == ["Unit", "Service", "Install"]
    service = unit["Service"]
    assert service["Restart"] == "always"
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    assert service["ReadWritePaths"] == service["WorkingDirectory"]
    # These break GPUs and compiling libraries; the page says so.
    assert not {"PrivateDevices", "MemoryDenyWriteExecute"} & set(service)


@pytest.mark.parametrize("name", UNITS)
def test_what_a_unit_starts_is_a_command_with_options_that_it_takes(name: str) -> None:
    program, *words = shlex.split(read(UNITS[name])["Service"]["ExecStart"])
    assert Path(program).name == "lepton-fed"
    command = get_command(app)
    assert isinstance(command, click.Group)
    command = command.commands[words.pop(0)]
    context = command.make_context("lepton-fed", words)
    conf = Path(str(context.params["conf"]))
    assert not conf.is_absolute()
    assert (ROOT / conf).is_file(), "init writes it"


@pytest.mark.parametrize("name", UNITS)
def test_exit_codes_that_a_restart_cannot_mend_are_documented_ones(name: str) -> None:
    errors = (ROOT / "docs" / "reference" / "errors.md").read_text()
    codes = re.findall(r"\d+", read(UNITS[name])["Service"]["RestartPreventExitStatus"])
    assert codes == ["2", "6"]
    for code in codes:
        assert re.search(rf"^\| {code} \|", errors, re.MULTILINE)


@pytest.mark.parametrize(
    "line",
    ["Restart = always", "Restarts=always", "Restart=allways", "[Servcie]", "Restart always",
     "; Restart=always", "[Service]", "RestartSec=1h", "Restart=always", "ExecStart=lepton-fed"],
)  # fmt: skip
def test_a_slip_of_the_pen_would_be_found(line: str) -> None:
    with pytest.raises(AssertionError):
        read(f"[Service]\nRestart=always\n{line}\n")


def test_each_line_that_is_explained_is_in_a_unit() -> None:
    table = PAGE.split("| line | why |", 1)[1].split("\n\n", 1)[0]
    cells = [row.split(" | ")[0] for row in table.splitlines()[2:]]
    explained = [name for cell in cells for name in re.findall(r"`(\w+=[^`]*)`", cell)]
    assert len(explained) > 10
    for line in explained:
        assert any(re.search(rf"^{re.escape(line)}", text, re.M) for text in UNITS.values()), line


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_itself_finds_nothing_wrong(name: str, tmp_path: Path) -> None:
    program = shutil.which("true")
    assert program is not None
    text = re.sub(r"^ExecStart=\S+", f"ExecStart={program}", UNITS[name], flags=re.MULTILINE)
    path = tmp_path / name
    path.write_text(text)
    words = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    path.write_text(text.replace("Restart=always", "Restart=allways"))
    broken = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "allways" in broken.stderr, "it would have said so"
