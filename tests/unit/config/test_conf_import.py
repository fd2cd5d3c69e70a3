"""What the config room may not cost: loading a conf imports no framework and takes an instant."""

from __future__ import annotations

import subprocess
import sys

_FRAMEWORKS = "('torch', 'sklearn', 'flwr', 'opacus', 'onnx', 'onnxruntime')"


def _run(code: str) -> str:
    done = subprocess.run(  # the code is written in this file
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_loading_a_conf_imports_no_framework() -> None:
    code = (
        "import sys\n"
        "from lepton_fed.config import explain, render, load, templates, schema\n"
        "conf = load.load_values(schema.SimulationConf, templates.template('simulation')).conf\n"
        "render.render(conf, 'simulation')\n"
        "explain.explain('simulation', 'privacy.record.epsilon')\n"
        f"print([name for name in {_FRAMEWORKS} if name in sys.modules])\n"
    )
    assert _run(code) == "[]"


def test_importing_the_loader_takes_well_under_a_quarter_of_a_second() -> None:
    # Processor time of the best of three: other work on the machine must not decide.
    code = (
        "import time; start = time.process_time(); import lepton_fed.config.load;"
        "print(time.process_time() - start)"
    )
    assert min(float(_run(code)) for _ in range(3)) < 0.25
