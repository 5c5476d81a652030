"""What is imported where: copies of the package, damaged files, and an unfit SpeechBrain."""

import json
import os
import shutil
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import torch
from helpers import ROOT

import sb_fast_sligru
from sb_fast_sligru import _library, _sources, info

INFO = {"torch": "2.11.0", "cuda": None, "archs": "", "code": []}


# ---- where the libraries lie


@pytest.fixture
def checkout(tmp_path):
    """The sources, and a package installed from them in a folder of Python's path."""
    shutil.copytree(ROOT / "cuda_ops", tmp_path / "checkout/cuda_ops")
    (tmp_path / "checkout/sb_fast_sligru").mkdir()
    installed = tmp_path / "site-packages/sb_fast_sligru"
    installed.mkdir(parents=True)
    (installed / "_C.abi3.so").touch()
    built_from = _sources.digest(tmp_path / "checkout/cuda_ops")
    (installed / "_build_info.json").write_text(json.dumps(INFO | {"sources": built_from}))
    return str(tmp_path / "checkout/sb_fast_sligru")


def find(checkout):
    top = os.path.dirname(os.path.dirname(checkout))
    return _library._find(checkout, [os.path.dirname(checkout), f"{top}/site-packages"])


def test_a_checkout_finds_the_package_that_it_hides(checkout):
    folder, error = find(checkout)
    assert folder.endswith("site-packages/sb_fast_sligru") and error is None


def test_libraries_beside_the_package_come_first(checkout):
    (Path(checkout) / "_C.abi3.so").touch()
    assert find(checkout) == (checkout, None)


def test_libraries_of_other_sources_are_not_taken(checkout):
    with open(Path(checkout).parent / "cuda_ops/light_gru/cell.h", "a") as file:
        file.write("\n")
    folder, error = find(checkout)
    assert folder == checkout
    assert "built from other sources (run in " in error and _library.BUILD_COMMAND in error


def test_an_installed_package_takes_no_others_libraries(checkout):
    shutil.rmtree(Path(checkout).parent / "cuda_ops")
    assert find(checkout) == (checkout, f"_C is not built (run: {_library.BUILD_COMMAND})")


# ---- libraries and files that are not as they should be


@pytest.mark.parametrize("text", ['{"torch": "2.1', "[]", "{}", "\0\0\0", ""], ids=repr)
def test_a_damaged_build_info(tmp_path, text):
    (tmp_path / "_build_info.json").write_text(text)
    found, error = _library._read_build_info(tmp_path)
    assert found == {} and "_build_info.json cannot be read: " in error


def test_a_library_that_does_not_load(tmp_path, monkeypatch):
    """The linker's words, not those of torch, which names the file alone."""
    monkeypatch.setattr(_library, "library_folder", str(tmp_path))
    path = tmp_path / "_C.abi3.so"
    assert _library._load("_C").startswith("_C is not built")
    path.write_bytes(b"not a library")
    reason = _library._load("_C")
    assert f"under torch {torch.__version__}: " in reason and "file too short" in reason


def test_a_damaged_installation_is_imported_and_tells(tmp_path):
    package = tmp_path / "sb_fast_sligru"
    shutil.copytree(ROOT / "sb_fast_sligru", package, ignore=shutil.ignore_patterns("*.so"))
    (package / "_build_info.json").write_text('{"torch": ')
    (package / "_C.abi3.so").write_bytes(b"\x7fELF")
    script = "import torch; from sb_fast_sligru import info, ops; print(*info.report(), sep='\\n')"
    script += "; print(ops.light_gru(torch.zeros(1, 2, 8), torch.eye(8)[:, :4], layer_norm=True))"
    run = run_python(script, tmp_path)
    assert run.returncode == 0, run.stderr
    assert "CPU library     _C does not load" in run.stdout
    assert f"libraries       {package}" in run.stdout
    assert "slow PyTorch loop" in run.stderr


def test_a_second_copy_in_a_process_is_refused(tmp_path):
    """The operators would be registered twice, in which torch ends the process."""
    shutil.copytree(ROOT / "sb_fast_sligru", tmp_path / "sb_fast_sligru")
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import sb_fast_sligru
for name in [name for name in sys.modules if name.startswith("sb_fast_sligru")]:
    del sys.modules[name]
sys.path.insert(0, {str(tmp_path)!r})
import sb_fast_sligru
"""
    run = run_python(script, tmp_path)
    *_, line = run.stderr.splitlines()
    assert run.returncode == 1
    assert line.startswith(
        f"ImportError: sb_fast_sligru in {tmp_path}/sb_fast_sligru is the second"
    )
    assert str(_library.library_folder) in line


def run_python(script, folder):
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )


# ---- SpeechBrain


@pytest.fixture
def speechbrain(monkeypatch):
    """Puts another SpeechBrain in place: its version, and its module speechbrain.nnet.RNN."""

    def put(version, rnn):
        real = metadata.version

        def pretended(name):
            if name == "speechbrain" and version is None:
                raise metadata.PackageNotFoundError(name)
            return version if name == "speechbrain" else real(name)

        monkeypatch.setattr(metadata, "version", pretended)
        monkeypatch.setitem(sys.modules, "speechbrain.nnet", rnn)
        monkeypatch.setitem(sys.modules, "speechbrain", types.ModuleType("speechbrain"))
        lobes = types.ModuleType("speechbrain.lobes")
        lobes.features = None
        monkeypatch.setitem(sys.modules, "speechbrain.lobes", lobes)
        features = types.ModuleType("speechbrain.processing.features")
        features.InputNormalization = None
        monkeypatch.setitem(sys.modules, "speechbrain.processing.features", features)
        models = types.ModuleType("speechbrain.lobes.models")
        models.CRDNN = None
        monkeypatch.setitem(sys.modules, "speechbrain.lobes.models", models)
        decoders = types.ModuleType("speechbrain.decoders")
        decoders.scorer = decoders.seq2seq = None
        monkeypatch.setitem(sys.modules, "speechbrain.decoders", decoders)
        for name in ("rnn", "_stock"):
            monkeypatch.delitem(sys.modules, f"sb_fast_sligru.{name}", raising=False)
            monkeypatch.delattr(sb_fast_sligru, name, raising=False)

    yield put
    # What was imported meanwhile is not what other tests have; monkeypatch restores the rest.
    for name in ("rnn", "_stock"):
        sys.modules.pop(f"sb_fast_sligru.{name}", None)
        vars(sb_fast_sligru).pop(name, None)


class Failing(types.ModuleType):
    """A module whose parts fail to import."""

    def __init__(self, error):
        super().__init__("speechbrain.nnet")
        self.error = error

    def __getattr__(self, name):
        if name != "RNN":
            raise AttributeError(name)
        code = compile("raise error from error.__cause__", "torchaudio/__init__.py", "exec")
        exec(code, {"error": self.error})


def not_loaded(path, words):
    """As torch.ops.load_library raises it."""
    error = OSError(f"Could not load this library: {path}")
    error.__cause__ = OSError(words)
    return error


def old_speechbrain():
    nnet = types.ModuleType("speechbrain.nnet")
    nnet.RNN = types.ModuleType("speechbrain.nnet.RNN")  # without SLiGRU
    for name in (
        "CNN",
        "activations",
        "containers",
        "dropout",
        "embedding",
        "linear",
        "normalization",
        "pooling",
    ):
        setattr(nnet, name, None)
    return nnet


@pytest.mark.parametrize(
    "version, nnet, said",
    [
        (
            None,
            Failing(ModuleNotFoundError("No module named 'speechbrain'", name="speechbrain")),
            "SpeechBrain is not installed (run: pip install 'speechbrain>=1.1')",
        ),
        (
            "1.0.3",
            old_speechbrain(),
            "SpeechBrain 1.0.3 is too old (run: pip install 'speechbrain>=1.1')",
        ),
        (
            "1.1.2",
            Failing(RuntimeError("Torch 13.2\nand TorchAudio 13.0 differ in CUDA")),
            "SpeechBrain 1.1.2 does not import: RuntimeError: Torch 13.2 and TorchAudio 13.0 "
            f"differ in CUDA (torch here is {torch.__version__}; pairs that work: ",
        ),
        (
            "1.1.2",
            Failing(not_loaded("_torchaudio.so", "libc10_cuda.so: cannot open shared object file")),
            "SpeechBrain 1.1.2 does not import: OSError: Could not load this library: "
            "_torchaudio.so: libc10_cuda.so: cannot open shared object file "
            f"(torch here is {torch.__version__}; pairs that work: ",
        ),
    ],
    ids=["missing", "old", "another torchaudio", "torchaudio of another torch"],
)
def test_an_unfit_speechbrain_is_told(speechbrain, version, nnet, said):
    speechbrain(version, nnet)
    with pytest.raises(ImportError) as caught:
        from sb_fast_sligru import SLiGRU  # noqa: F401
    assert str(caught.value).startswith(said)
    assert caught.value.__cause__ is not None
    (line,) = [line for line in info.report() if line.startswith("speechbrain")]
    assert said in line


def test_no_cause_is_swallowed(speechbrain):
    """An AttributeError in our module would read as "cannot import name"."""
    nnet = old_speechbrain()
    nnet.RNN.SLiGRU_Layer = torch.nn.Module  # the only name that it has
    speechbrain("1.2.0", nnet)
    with pytest.raises(ImportError, match="has no attribute 'LiGRU_Layer'") as caught:
        from sb_fast_sligru import SLiGRU  # noqa: F401
    assert isinstance(caught.value.__cause__, AttributeError)


def test_info_tells_where_the_package_lies_and_that_speechbrain_imports():
    lines = info.report()
    assert f"package         {ROOT / 'sb_fast_sligru'}" in lines
    assert f"libraries       {_library.library_folder}" in lines
    assert f"speechbrain     {metadata.version('speechbrain')}, imports" in lines
