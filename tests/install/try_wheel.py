"""The wheels of `make wheel` in fresh environments: `make test-wheel`; it downloads gigabytes.

One of them: `make test-wheel TRY="torch2.10"`.
"""

import re
import shutil
import time

import pytest
from environments import ROOT, Environment, kept

# The oldest and the newest Python and torch that are supported, and the pairs between that work
# with SpeechBrain, which imports torchaudio. Python, packages, whether SpeechBrain imports.
ENVIRONMENTS = [
    ("3.10", ("torch==2.10.0", "torchaudio==2.10.0", "speechbrain==1.1.0"), True),
    ("3.13", ("torch==2.14.1", "torchaudio==2.11.0", "speechbrain==1.1.2"), True),
    ("3.13", ("torch==2.15.0", "torchaudio==2.11.0", "speechbrain==1.1.2"), False),
]
IDS = [f"py{version}-{packages[0].replace('==', '')}" for version, packages, _ in ENVIRONMENTS]
WHEELS = {
    re.search(r"\+(\w+)-", path.name)[1]: path for path in sorted((ROOT / "dist").glob("*.whl"))
}
KINDS = sorted(WHEELS) or ["cpu"]
LAYER = """
import torch
from sb_fast_sligru import SLiGRU
net = SLiGRU(hidden_size=16, input_shape=(2, 5, 3), bidirectional=True)
output, hidden = net(torch.rand(2, 5, 3))
output.sum().backward()
print("trained", tuple(output.shape))
"""


@pytest.fixture(params=ENVIRONMENTS, ids=IDS)
def environment(request, tmp_path):
    assert WHEELS, "dist/ has no wheels (run: make wheel)"
    version, packages, imports = request.param
    fresh = Environment(tmp_path / "environment", version, below=kept(version, *packages))
    fresh.speechbrain_imports = imports
    return fresh


@pytest.mark.parametrize("kind", KINDS)
def test_wheel(environment, kind, tmp_path):
    """It installs in seconds, compiles nothing, asks for nothing more, and runs."""
    start = time.perf_counter()
    environment.pip("install", "--no-index", "--only-binary=:all:", WHEELS[kind])
    assert time.perf_counter() - start < 60
    environment.pip("check")
    report = environment.runs("-m", "sb_fast_sligru.info", cwd=tmp_path)
    assert "CPU library     loaded" in report
    assert f"package         {environment.site}/sb_fast_sligru" in report
    cuda = re.search("^CUDA library +(.*)$", report, re.M)[1]
    if kind == "cpu":
        assert cuda.startswith("built without CUDA: NO_CUDA=1")
    else:
        torch_cuda = re.search(r"^torch .* CUDA (\d+)", report, re.M)[1]
        fits = kind == f"cu{torch_cuda}"
        assert cuda.startswith("loaded" if fits else "built for CUDA")
    if environment.speechbrain_imports:
        assert "trained (2, 5, 32)" in environment.runs("-c", LAYER, cwd=tmp_path)
    else:
        said = environment.runs("-c", LAYER, cwd=tmp_path, succeeds=False).splitlines()[-1]
        assert said.startswith("ImportError: SpeechBrain 1.1.2 does not import: ")
        assert "pairs that work" in said
    environment.pip("uninstall", "--yes", "sb_fast_sligru")
    assert not list(environment.site.glob("sb_fast_sligru*"))


def test_operator(environment, tmp_path):
    """Its tests pass with the wheel, away from the sources."""
    environment.pip("install", "--no-index", "--no-deps", WHEELS["cpu"])
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "tests/ops", tmp_path / "tests/ops")
    for name in ("conftest.py", "fuzz.py", "helpers.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    output = environment.runs("-m", "pytest", "-q", "tests/ops", cwd=tmp_path)
    assert int(re.search(r"(\d+) passed", output)[1]) > 180
