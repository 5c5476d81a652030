"""Runs of the recipes as they happen: over several processes, killed, on bad input, on full disks.

Where it does not matter what is learnt, the corpus is noise: no synthesiser, short, and as many
utterances of whatever lengths a test needs.
"""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import ROOT, small_disk
from recorded_run import record_run
from speechbrain.augment.time_domain import Resample
from tiny_corpora import SPLITS, make_noise
from tiny_runs import TINY, YAML, complaint

import sb_fast_sligru
import train_ctc
from sb_fast_sligru.reference import relative_error
from sligru_recipes.corpora.librispeech import prepare_librispeech
from sligru_recipes.training.experiment import run_script

pytestmark = pytest.mark.usefixtures("environment_described_once", "one_thread")

RECORDED_RUN = Path(__file__).with_name("recorded_run.py")
# torchrun, of this interpreter
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

# Every layer treats each utterance alone. CRDNN's linear layers have a BatchNorm, so there are
# none; its convolutions have LayerNorms anyway.
ALONE = ("--rnn_class=!name:recorded_run.LayerNormSLiGRU", "--dnn_blocks=0")


@pytest.fixture(scope="module")
def even_noise(tmp_path_factory):
    """Eight train utterances of one length: no batch has padding."""
    return make_noise(tmp_path_factory.mktemp("even"), [0.8] * 8)


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Twelve train utterances of as many lengths; the first is the shortest."""
    return make_noise(tmp_path_factory.mktemp("noise"), np.linspace(0.6, 2.0, 12).tolist())


def lines(record, rank=0):
    """What a process of a recorded run trained on, a dict for each batch."""
    return list(map(json.loads, Path(f"{record}.{rank}.jsonl").read_text().splitlines()))


def weights(record, rank=0):
    return torch.load(f"{record}.{rank}.pt")


def log_lines(output_folder):
    """train_log.txt without the seconds."""
    text = (output_folder / "train_log.txt").read_text()
    return re.sub(r"seconds: \d+", "", text).splitlines()


def start(folder, *runs, launcher=(sys.executable,), **environment):
    """Start recorded runs in a process of their own."""
    folder.mkdir(exist_ok=True)
    (folder / "runs.json").write_text(json.dumps(runs, default=str))
    return subprocess.Popen(
        [*launcher, RECORDED_RUN, folder / "runs.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# Several processes


@pytest.fixture(scope="module")
def two_processes(even_noise, tmp_path_factory):
    """A LayerNorm model and the recipe's own, each trained by two processes; what they printed."""
    folder = tmp_path_factory.mktemp("two")
    runs = [
        {
            "record": folder / name,
            "script": "train_ctc",
            "argv": [
                *distributed_arguments(even_noise, folder / f"{name}_output", batch_size=2),
                "--distributed_backend=gloo",
                *arguments,
            ],
        }
        for name, arguments in (("alone", ALONE), ("batch", ()))
    ]
    process = start(folder, *runs, launcher=TORCHRUN)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    return folder, output


def distributed_arguments(corpus, output_folder, batch_size):
    """Fixed batches, and SGD: Adam's first updates make whole steps of gradients near zero."""
    return [
        *TINY,
        f"--data_folder={corpus}",
        f"--output_folder={output_folder}",
        "--dynamic_batching=False",
        f"--batch_size={batch_size}",
        "--number_of_epochs=3",
        "--opt_class=!name:torch.optim.SGD",
        "--lr=0.1",
    ]


@pytest.mark.parametrize("name, arguments, bound", [("alone", ALONE, 1e-5), ("batch", (), 1e-4)])
def test_two_processes_follow_one(name, arguments, bound, two_processes, even_noise, tmp_path):
    """Two processes of two utterances each make the updates of one process of four.

    Each rank's CTC loss is a mean over its utterances, and DDP averages the ranks' gradients: with
    as many utterances on each that is the mean over all. Utterances of one length need no padding,
    which convolutions and the backward RNN would see. What is left is the order of float32 sums,
    relative differences of some 1e-7 an update: 1e-5 after six is far from them, and farther from a
    mistake. BatchNorm, over all processes, amplifies them.
    """
    folder, _ = two_processes
    argv = distributed_arguments(even_noise, tmp_path / "output", batch_size=4)
    record_run(tmp_path / "one", "train_ctc", [*argv, *arguments])
    one = lines(tmp_path / "one")
    ranks = [lines(folder / name, rank) for rank in (0, 1)]
    assert len(one) == 6
    for whole, *halves in zip(one, *ranks, strict=True):
        assert sorted(halves[0]["ids"] + halves[1]["ids"]) == whole["ids"]
        mean = (halves[0]["loss"] + halves[1]["loss"]) / 2
        assert mean == pytest.approx(whole["loss"], rel=bound)
    expected = weights(tmp_path / "one")
    for rank in (0, 1):
        for key, weight in weights(folder / name, rank).items():
            assert relative_error(weight, expected[key]) < bound, key
    # Nothing of that holds for a model that did not learn.
    assert one[-1]["loss"] < one[1]["loss"]


def test_batch_norm_model_trains_on_two_cpus(two_processes):
    folder, _ = two_processes
    assert len(lines(folder / "batch")) == 6
    first, second = (weights(folder / "batch", rank) for rank in (0, 1))
    assert any("running_mean" in name for name in first)
    for name, weight in first.items():
        assert weight.isfinite().all(), name
        assert torch.equal(weight, second[name]), name
    # What each trained on differed, so the weights are equal because gradients were averaged.
    assert lines(folder / "batch", 0)[0]["ids"] != lines(folder / "batch", 1)[0]["ids"]


def test_the_number_of_loaders_processes_changes_nothing(even_noise, tmp_path):
    """With random augmentation, and the same batches in another order in each epoch."""
    augmentations = [f"--enable_{name}=True" for name in ("speed_perturb", "drop_freq")]
    for processes in (0, 1, 2):
        argv = distributed_arguments(even_noise, tmp_path / f"{processes}_output", 2)
        argv += [*augmentations, "--enable_drop_chunk=True", "--sorting=random"]
        record_run(tmp_path / f"{processes}", "train_ctc", [*argv, f"--num_workers={processes}"])
    expected = weights(tmp_path / "0")
    for processes in ("1", "2"):
        assert lines(tmp_path / processes) == lines(tmp_path / "0")
        for name, weight in weights(tmp_path / processes).items():
            assert torch.equal(weight, expected[name]), name


def test_accumulated_gradients_are_those_of_one_batch(even_noise, tmp_path):
    """Two batches of two utterances make one update of four, up to the order of float32 sums.

    Features are normalised by utterance: the recipe's statistics are of what was seen so far, which
    for the first batch of two is not what it is for a batch of four.
    """
    for name, batch_size, factor in (("whole", 4, 1), ("parts", 2, 2)):
        argv = distributed_arguments(even_noise, tmp_path / f"{name}_output", batch_size)
        argv += [*ALONE, "--norm_type=sentence", f"--grad_accumulation_factor={factor}"]
        record_run(tmp_path / name, "train_ctc", argv)
    whole, parts = lines(tmp_path / "whole"), lines(tmp_path / "parts")
    means = [(a["loss"] + b["loss"]) / 2 for a, b in zip(parts[::2], parts[1::2], strict=True)]
    assert means == pytest.approx([line["loss"] for line in whole], rel=1e-5)
    expected = weights(tmp_path / "whole")
    for name, weight in weights(tmp_path / "parts").items():
        assert relative_error(weight, expected[name]) < 1e-5, name


# Killed


@pytest.fixture(scope="module")
def nan_manifests(noise, tmp_path_factory):
    """Arguments that train on `noise` with its first utterance, the shortest, full of NaN."""
    folder = tmp_path_factory.mktemp("manifests")
    prepare_librispeech(noise, folder, SPLITS[:1], SPLITS[1:2], SPLITS[2:], num_workers=0)
    soundfile.write(folder / "nan.wav", np.full(9600, np.nan), 16000, subtype="FLOAT")
    manifest = (folder / "train.csv").read_text()
    first = re.search(r"[^,]*1-10-0000\.flac", manifest)[0]
    (folder / "train.csv").write_text(manifest.replace(first, str(folder / "nan.wav")))
    return (
        "--skip_prep=True",
        f"--train_csv={folder}/train.csv",
        f"--valid_csv={folder}/dev-clean.csv",
        f"--test_csv=[{folder}/test-clean.csv]",
    )


def killed_arguments(noise, nan_manifests):
    """Arguments of the runs that are killed, by their names."""
    common = (*TINY, f"--data_folder={noise}", "--number_of_epochs=3", "--ckpt_interval_minutes=0")
    return {
        # Sorted batches of two, each second makes an update; NaN in the first of each epoch.
        "fixed": (
            *common,
            "--ckpt_interval_steps=3",
            "--grad_accumulation_factor=2",
            *ALONE,
            *nan_manifests,
            "--dynamic_batching=False",
            "--batch_size=2",
            "--norm_type=sentence",
        ),
        "dynamic": (*common, "--ckpt_interval_steps=2", "--max_batch_length=4", "--num_buckets=3"),
    }


@pytest.fixture(scope="module")
def killed(noise, nan_manifests, tmp_path_factory):
    """Runs that were killed by SIGKILL in their second epoch, and then run again.

    The first after the 5th of 6 batches of its epoch; its last checkpoint was due after the 3rd,
    but came with the update after the 4th. The second while it wrote a checkpoint.
    """
    folder = tmp_path_factory.mktemp("killed")
    kills = {"fixed": {"kill_after_batch": 11}, "dynamic": {"kill_in_checkpoint": 8}}
    runs = {
        name: {
            "record": folder / name,
            "script": "train_ctc",
            "argv": [*argv, f"--output_folder={folder}/{name}_output"],
        }
        for name, argv in killed_arguments(noise, nan_manifests).items()
    }
    processes = [start(folder / f"{name}_run", run | kills[name]) for name, run in runs.items()]
    for process in processes:
        output = process.communicate(timeout=120)[0]
        assert process.returncode == -signal.SIGKILL, output
    before = {name: lines(folder / name) for name in runs}
    for run in runs.values():
        record_run(**run)
    return folder, before


@pytest.mark.parametrize("name", ["fixed", "dynamic"])
def test_killed_run_ends_as_if_it_had_not_been(killed, noise, nan_manifests, tmp_path, name):
    """Batches, losses, weights and log are those of an undisturbed run, to the last bit."""
    folder, before = killed
    argv = [*killed_arguments(noise, nan_manifests)[name], f"--output_folder={tmp_path}/output"]
    record_run(tmp_path / "undisturbed", "train_ctc", argv)
    undisturbed = lines(tmp_path / "undisturbed")
    before, everything = before[name], lines(folder / name)
    after = everything[len(before) :]
    # It stopped in the second epoch, resumed there, and not at its first batch.
    assert before[-1]["epoch"] == after[0]["epoch"] == 2
    assert after[0]["ids"] != next(b["ids"] for b in undisturbed if b["epoch"] == 2)
    # What came after the last checkpoint is trained on again, and nothing else.
    kept = before[: len(undisturbed) - len(after)]
    assert len(before) - len(kept) <= 2
    assert str(kept + after) == str(undisturbed)  # NaN is not equal to NaN
    for epoch in (1, 2, 3):
        trained = [ids for b in kept + after if b["epoch"] == epoch for ids in b["ids"]]
        assert len(trained) == len(set(trained)) == 12
    expected = weights(tmp_path / "undisturbed")
    for key, weight in weights(folder / name).items():
        assert torch.equal(weight, expected[key]), key
    assert log_lines(folder / f"{name}_output") == log_lines(tmp_path / "output")


def test_unfinished_checkpoint_is_cleared_away(killed):
    """It was not taken for one: the test above would have failed."""
    folder, _ = killed
    names = [path.name for path in (folder / "dynamic_output/save").iterdir() if path.is_dir()]
    assert names and all(name.startswith("CKPT+") for name in names)


def test_updates_with_nan_are_skipped_and_counted(killed):
    """Also the one whose epoch was stopped after it."""
    folder, _ = killed
    first_batches = lines(folder / "fixed")[::6][:2]
    assert all(np.isnan(batch["loss"]) for batch in first_batches)
    epochs = [line for line in log_lines(folder / "fixed_output") if line.startswith("epoch")]
    assert [re.search(r"skipped updates: (\d+)", line)[1] for line in epochs] == ["1", "1", "1"]
    for name, weight in weights(folder / "fixed").items():
        assert weight.isfinite().all(), name


# What can be wrong


def truncate(path):
    path.write_bytes(path.read_bytes()[:2000])
    return path


@pytest.fixture
def own_noise(tmp_path):
    """A corpus that a test may damage."""
    return make_noise(tmp_path / "noise", [0.8] * 2)


def bad_input_arguments(corpus, tmp_path):
    return [*TINY, f"--data_folder={corpus}", f"--output_folder={tmp_path}/output"]


def test_truncated_flac_is_named(own_noise, tmp_path):
    path = truncate(own_noise / "train-clean-100/1/10/1-10-0001.flac")
    message = complaint(bad_input_arguments(own_noise, tmp_path))
    assert f"{path}: truncated" in message


def test_flac_truncated_after_the_preparation_is_named(own_noise, tmp_path):
    argv = [*bad_input_arguments(own_noise, tmp_path), "--number_of_epochs=1"]
    prepare_librispeech(
        own_noise, tmp_path / "output/save", *([split] for split in SPLITS), num_workers=0
    )
    path = truncate(own_noise / "train-clean-100/1/10/1-10-0001.flac")
    assert str(path) in complaint(argv)
    assert str(path) in complaint([*argv, "--num_workers=1"])


def test_foreign_characters_are_named(own_noise, tmp_path):
    path = own_noise / "train-clean-100/1/10/1-10.trans.txt"
    path.write_text(path.read_text() + "1-10-0001 Ü 8\n".replace("0001", "0002"))
    shutil.copy(path.with_name("1-10-0001.flac"), path.with_name("1-10-0002.flac"))
    message = complaint(bad_input_arguments(own_noise, tmp_path))
    assert "1-10-0002.flac" in message and "'8', 'Ü'" in message


def test_characters_outside_a_given_vocabulary_are_named(own_noise, tmp_path):
    argv = bad_input_arguments(own_noise, tmp_path)
    train_ctc.main([*map(str, argv), "--number_of_epochs=1"])
    path = own_noise / "train-clean-100/1/10/1-10.trans.txt"
    path.write_text(re.sub(r"(1-10-0001) .*", r"\1 QUIZ", path.read_text()))
    given = (tmp_path / "output/save/6_char.model").rename(tmp_path / "given.model")
    shutil.rmtree(tmp_path / "output")
    message = complaint([*argv, f"--tokenizer_file={given}"])
    assert "train.csv: 1-10-0001 has the character 'I'" in message


def test_empty_split_is_named(own_noise, tmp_path):
    shutil.rmtree(own_noise / "dev-clean")
    message = complaint(bad_input_arguments(own_noise, tmp_path))
    assert "no folder 'dev-clean'" in message
    (own_noise / "dev-clean").mkdir()
    message = complaint(bad_input_arguments(own_noise, tmp_path))
    assert f"dev-clean: no usable utterance in {own_noise}" in message


def test_empty_manifest_is_named(own_noise, tmp_path):
    (tmp_path / "empty.csv").write_text("ID,duration,wav,spk_id,wrd\n")
    argv = [*bad_input_arguments(own_noise, tmp_path), f"--valid_csv={tmp_path}/empty.csv"]
    assert f"{tmp_path}/empty.csv has no utterance" in complaint(argv)


def test_key_given_twice_is_named(own_noise, tmp_path):
    argv = [*bad_input_arguments(own_noise, tmp_path), "--rnn_neurons=9"]
    assert 'duplicate key "rnn_neurons"' in complaint(argv)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--tokenizer_file={0}/none.model", "tokenizer_file {0}/none.model does not exist"),
        ("--tokenizer_file={0}", "tokenizer_file {0} does not exist or is no file"),
        ("--noise_folder={0}/none", "noise_folder {0}/none does not exist or is no folder"),
        ("--pretrained_folder={0}/none", "pretrained_folder {0}/none does not exist"),
        ("--pretrained_folder={0}", "pretrained_folder {0} has no model.ckpt"),
        ("--train_csv=$DATA/train.csv", "train_csv $DATA/train.csv: $DATA is not expanded here"),
        ("--shard_folder=~/shards", "shard_folder ~/shards: ~ is not expanded here"),
        ("--valid_csv=${{DATA}}/dev.csv", "valid_csv ${{DATA}}/dev.csv: ${{DATA}} is not expanded"),
        ("--test_csv=[$A/a.csv,$B/b.csv]", "test_csv $A/a.csv: $A is not expanded here"),
        ("--lr=high", "lr must be a number, got 'high'"),
        ("--number_of_epochs=[3]", "number_of_epochs must be a number, got [3]"),
        ("--skip_bad_files=1", "skip_bad_files must be True or False, got 1"),
        ("--opt_class=!name:torch.optim.SGD {{momentum: 0.9}}", "keeps the class of"),
        ("--rnn_class={{rho: 0.9}}", "rnn_class has no arguments in"),
        ("--rnn_class=!name:sligru.SLiGRU", "There is no such entity as sligru.SLiGRU"),
        ("--rnn_class=!new:torch.nn.LSTM", "librispeech_ctc.yaml: Invalid argument to class"),
        ("--avg_checkpoints=0", "avg_checkpoints must be a whole number, at least 1, got 0"),
        ("--avg_checkpoints=2.5", "avg_checkpoints must be a whole number, at least 1, got 2.5"),
        ("--num_workers=-1", "num_workers must be a whole number, at least 0, got -1"),
        ("--time_pooling_size=0", "time_pooling_size must be a whole number, at least 1, got 0"),
        ("--hop_length=0", "hop_length must be above 0, got 0"),
        ("--grad_accumulation_factor=0", "grad_accumulation_factor must be a whole number"),
        ("--batch_size=0", "batch_size must be a whole number, at least 1, got 0"),
        ("--number_of_epochs=-1", "number_of_epochs must be a whole number, at least 0, got -1"),
        ("--test_batch_size=0", "test_batch_size must be a whole number, at least 1, got 0"),
        ("--max_batch_length=0", "max_batch_length must be above 0, got 0"),
        ("--opt_class={{momentum: 0.9}}", "opt_class: Adadelta.__init__() got an unexpected"),
        ("--opt_class=!name:torch.nn.Linear", "opt_class: "),
        ("--opt_class=!name:torch.optim.LBFGS", "opt_class: LBFGS needs a closure"),
        ("--lr=-1.0", "lr must be at least 0, got -1.0"),
        (
            "--train_dataloader_opts={{workers: 1}}",
            "train_dataloader_opts: DataLoader.__init__() got",
        ),
        ("--dynamic_batch_sampler={{size: 1}}", "dynamic_batch_sampler: DynamicBatchSampler.__"),
        ("--cnn_blocks=3", "the model cannot be built: list index out of range (CRDNN.py: "),
        ("--token_type=word", "token_type must be one of unigram, bpe, char, got 'word'"),
        ("--tokenizer_file={0}/noise.txt", "tokenizer_file {0}/noise.txt is damaged, or no Sent"),
        ("--test_csv={0}/none.csv", "test_csv {0}/none.csv does not exist"),
        ("--valid_csv=[{0}/none.csv]", "valid_csv {0}/none.csv does not exist"),
        ("--train_csv={0}/none.csv", "train_csv {0}/none.csv does not exist"),
        ("--skip_prep=True", "train.csv does not exist"),
        ("--output_folder=", "output_folder is empty"),
        ("--data_folder=null", "data_folder is empty"),
        ("--train_csv=", "train_csv is empty"),
        ("--data_folder={0}/noise.txt", "data_folder {0}/noise.txt does not exist or is no folder"),
        ("--sorting=length", "sorting must be one of ascending, descending, random, got 'length'"),
        ("--precision=fp16", "precision fp16 needs a CUDA device, got cpu"),
        ("--eval_precision=fp16", "precision fp16 needs a CUDA device, got cpu"),
        ("--annealing_factor=0", "annealing_factor must be above 0 and at most 1, got 0"),
        ("--character_coverage=0", "character_coverage must be above 0 and at most 1, got 0"),
        ("--improvement_threshold=.nan", "improvement_threshold must be a number, got nan"),
        ("--max_batch_length=.inf", "max_batch_length must be above 0, got inf"),
        ("--avg_checkpoints=True", "avg_checkpoints must be a number, got True"),
        ("--seed=1.5", "seed must be a whole number from 0 to 4294967295, got 1.5"),
        ("--log_interval_minutes=-1", "log_interval_minutes must be at least 0, got -1"),
        ("--ckpt_interval_steps=-3", "ckpt_interval_steps must be at least 0, got -3"),
        ("--debug_batches=0", "debug_batches must be a whole number, at least 1, got 0"),
        ("--dnn_blocks=-1", "dnn_blocks must be a whole number, at least 0, got -1"),
        ("--lr=.inf", "lr must be at least 0, got inf"),
        ("--opt_class={{lr: 1}}", "opt_class has lr, which is a key of its own: --lr"),
        ("--opt_class=Adam", "opt_class must be a class such as !name:sb_fast_sligru.Adadelta,"),
        ("--ctc_cost=3", "ctc_cost must be a class such as !name:sb_fast_sligru.ctc_loss, got 3"),
        ("--ctc_cost=!name:torch.nn.CTCLoss", "ctc_cost: "),
        ("--checkpointer=null", "checkpointer must be a class such as !new:sligru_recipes"),
        ("--rnn_class=!name:torch.nn.LSTM", "librispeech_ctc.yaml: Must pass `input_shape`"),
        ("--valid_dataloader_opts={{batch_size: 0}}", "valid_dataloader_opts: batch_size should"),
        ("--dynamic_batch_sampler={{batch_ordering: a}}", "dynamic_batch_sampler: _permute_batch"),
        ("--dynamic_batch_sampler={{num_buckets: 0}}", "dynamic_batch_sampler: "),
        ("--enable_speed_perturb=True --speed_perturb={{speeds: []}}", "speed_perturb: "),
        ("--enable_drop_freq=True --drop_freq={{drop_freq_low: 2}}", "drop_freq: "),
        ("--device=gpu", "--device=gpu: it must be such as cpu or cuda:0"),
        ("--device=cuda:99", "--device=cuda:99: "),
        ("--device=meta", "--device=meta: PyTorch cannot compute on it here"),
        ("--device=vulkan", "--device=vulkan: PyTorch cannot compute on it here"),
        (
            "--ckpt_interval_steps=5 --ckpt_interval_minutes=5",
            "ckpt_interval_steps and ckpt_interval_minutes exclude each other",
        ),
    ],
)
def test_what_cannot_be_is_named_before_any_work(own_noise, tmp_path, argument, message):
    (tmp_path / "noise.txt").write_bytes(b"\x0enoise")
    given = [f"--{a}" for a in argument.format(tmp_path).removeprefix("--").split(" --")]
    keys = {a.partition("=")[0] for a in given}
    argv = [
        a for a in bad_input_arguments(own_noise, tmp_path) if str(a).partition("=")[0] not in keys
    ] + given
    assert message.format(tmp_path) in complaint(argv)
    assert list((tmp_path / "output").rglob("*.csv")) == []  # nothing was prepared


def test_missing_tensorboard_is_named(own_noise, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it then fails
    message = complaint([*bad_input_arguments(own_noise, tmp_path), "--use_tensorboard=True"])
    assert "use_tensorboard needs a package: pip install tensorboard" in message
    assert list((tmp_path / "output").rglob("*.csv")) == []


def test_any_path_will_do(tmp_path):
    """With what shells, CSV and YAML, and SpeechBrain's manifests, give a meaning."""
    folder = tmp_path / 'it\'s a "$folder", ü #1: {x} [y]'
    corpus = make_noise(folder / "corpus", [0.8] * 2)
    argv = bad_input_arguments(json.dumps(str(corpus)), tmp_path)[:-1]
    argv += [f"--output_folder={json.dumps(str(folder / 'run'))}", "--number_of_epochs=1"]
    argv = [str(argument) for argument in argv if argument != "--export_inference=False"]
    train_ctc.main(argv)
    assert (folder / "run/inference/model.ckpt").is_file()


def test_path_that_a_shell_did_not_expand_is_no_folder_of_that_name(own_noise, tmp_path):
    argv = [*bad_input_arguments(own_noise, tmp_path)[:-1], f"--output_folder={tmp_path}/$RUN/1"]
    assert "output_folder" in complaint(argv)
    assert not (tmp_path / "$RUN").exists()
    (tmp_path / "$RUN").mkdir()  # one that is called so may be used
    truncate(own_noise / "train-clean-100/1/10/1-10-0001.flac")
    argv[-1] = f"--output_folder={tmp_path}/$RUN"
    assert "truncated" in complaint(argv)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- lr\n- 3\n", "o.yaml has no keys"),
        ("", "o.yaml has no keys"),
        ("lr: 1\nlr: 2\n", "o.yaml, line 2: found duplicate key"),
        ("max_grad_norm: 1.0\n", "max_grad_norm is a run option: give it on the command line"),
        ("\xff\xfe", "o.yaml is not a text file"),
    ],
)
def test_override_file_that_is_none_is_named(own_noise, tmp_path, content, message):
    (tmp_path / "o.yaml").write_bytes(content.encode("latin-1"))
    argv = bad_input_arguments(own_noise, tmp_path)
    argv = [f"--overrides={tmp_path}/o.yaml" if "--overrides" in str(a) else a for a in argv]
    assert message in complaint(argv)


def test_checkpoints_by_steps_need_no_second_key(own_noise, tmp_path):
    """The YAML's own ckpt_interval_minutes gives way."""
    argv = [*bad_input_arguments(own_noise, tmp_path), "--number_of_epochs=1"]
    train_ctc.main([str(argument) for argument in (*argv, "--ckpt_interval_steps=1000")])
    settings = (tmp_path / "output/hyperparams.yaml").read_text()
    assert re.search(r"^ckpt_interval_minutes: 0\b", settings, re.MULTILINE)


def test_divergence_is_told_in_a_line(noise, nan_manifests, tmp_path):
    argv = [*TINY, f"--data_folder={noise}", *nan_manifests, f"--output_folder={tmp_path}"]
    argv += ["--dynamic_batching=False", "--batch_size=2", "--nonfinite_patience=0", *ALONE]
    message = complaint([*argv, "--norm_type=sentence"])
    assert "training diverged: in epoch 1, batch 1 the loss is nan" in message
    assert "nonfinite_patience" in message and "lower lr than 0.003" in message


def test_all_lines_of_a_message_are_printed():
    """But for an error of a loader's process, whose traceback is before it."""

    def fail_with(text):
        def main(argv):
            raise ValueError(text)

        with pytest.raises(SystemExit) as stop:
            run_script(main)
        return stop.value.code.partition(": ")[2]

    assert fail_with("the first line\n  and the second") == "the first line and the second"
    assert fail_with("") == "ValueError"
    text = "Caught OSError\nTraceback (most recent call last):\n  File\nOSError: x.flac"
    assert fail_with(text) == "OSError: x.flac"


def test_group_of_processes_is_left_at_the_end(tmp_path):
    def main(argv):
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
        )

    run_script(main)
    assert not torch.distributed.is_initialized()


def test_output_folder_that_cannot_be_made_is_named(own_noise, tmp_path):
    (tmp_path / "output").write_text("a file")
    message = complaint(bad_input_arguments(own_noise, tmp_path))
    assert f"save_folder cannot be made: Not a directory: '{tmp_path}/output/save'" in message
    argv = [*bad_input_arguments(own_noise, tmp_path)[:-1], f"--output_folder={tmp_path}/run"]
    for key in ("shard_folder", "output_wer_folder"):
        message = complaint([*argv, f"--{key}={tmp_path}/output/in/a/file"])
        assert f"{key} cannot be made: Not a directory" in message
    assert list((tmp_path / "run").rglob("*.csv")) == []


def test_folders_of_results_are_made_at_the_start(own_noise, tmp_path):
    argv = [*bad_input_arguments(own_noise, tmp_path), "--number_of_epochs=1"]
    argv += [f"--output_wer_folder={tmp_path}/wer/1", f"--train_log={tmp_path}/log/1/train.txt"]
    train_ctc.main([str(argument) for argument in argv])
    assert (tmp_path / "wer/1/wer_test-clean.txt").is_file()
    assert (tmp_path / "log/1/train.txt").is_file()


def test_blank_is_the_unknown_token(own_noise, tmp_path):
    """Another would be a letter that is never written."""
    argv = [*bad_input_arguments(own_noise, tmp_path), "--blank_index=3"]
    message = "tokenizer has blank_index 0, the YAML has blank_index 3: the blank is the unknown"
    assert message in complaint(argv)


def test_unknown_key_is_named_by_the_script(own_noise, tmp_path):
    """By the script itself: one line on stderr, exit status 1, no traceback."""
    argv = bad_input_arguments(own_noise, tmp_path)
    command = [sys.executable, ROOT / "recipes/LibriSpeech/train_ctc.py", *argv, "--batchsize=8"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert re.fullmatch(
        rf"train_ctc\.py: batchsize is neither a key of {YAML} nor a run option", run.stderr.strip()
    )


def test_full_disk_is_told_at_the_start(own_noise, tmp_path):
    with small_disk(500_000):
        message = complaint(bad_input_arguments(own_noise, tmp_path))
    assert "cannot write to save_folder" in message and f"{tmp_path}/output/save" in message


def test_disk_that_fills_up_costs_no_checkpoint(own_noise, tmp_path):
    """The run says what it could not save, and resumes from the checkpoint before."""
    argv = [*bad_input_arguments(own_noise, tmp_path), "--rnn_neurons=160", "--skip_prep=True"]
    argv.remove("--rnn_neurons=8")
    prepare_librispeech(
        own_noise, tmp_path / "output/save", *([split] for split in SPLITS), num_workers=0
    )
    train_ctc.main([str(argument) for argument in (*argv, "--number_of_epochs=1")])
    with small_disk(300_000):  # more than all other files have
        message = complaint([*argv, "--number_of_epochs=2"])
    assert f"no checkpoint could be saved in {tmp_path}/output/save" in message
    train_ctc.main([str(argument) for argument in (*argv, "--number_of_epochs=2")])
    epochs = [line for line in log_lines(tmp_path / "output") if line.startswith("epoch: ")]
    assert [line.split(",")[0] for line in epochs] == ["epoch: 1", "epoch: 2", "epoch: 2"]


# On a GPU


def on_gpu(argv):
    return [*(argument for argument in argv if argument != "--device=cpu"), "--device=cuda:0"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_sync_batch_norm_of_two_processes_is_batch_norm_of_one(device, tmp_path):
    """Two processes share the device; each has a part of the batch. In float64: no TF32."""
    torch.multiprocessing.spawn(compare_with_whole_batch, (tmp_path / "store", device), nprocs=2)


def compare_with_whole_batch(rank, store, device):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    for first in (2, 1):  # utterances of the first process, of 4
        torch.manual_seed(0)
        x, upstream = torch.randn(4, 30, 20), torch.randn(4, 30, 128)
        x, upstream = x.double().to(device), upstream.double().to(device)
        whole = sb_fast_sligru.SLiGRU(64, x.shape, bidirectional=True).double().to(device)
        parts = copy.deepcopy(whole)
        sb_fast_sligru.SyncBatchNorm.take_over(parts)
        mine = slice(0, first) if rank == 0 else slice(first, 4)
        results = []
        for net, batch in ((whole, slice(0, 4)), (parts, mine)):
            inputs = x[batch].clone().requires_grad_()
            outputs = net(inputs)[0]
            outputs.backward(upstream[batch])
            results.append((outputs, inputs.grad))
        for all_rows, own_rows in zip(*results, strict=True):
            assert relative_error(own_rows, all_rows[mine]) < 1e-10
        for (name, expected), parameter in zip(
            whole.named_parameters(), parts.parameters(), strict=True
        ):
            torch.distributed.all_reduce(parameter.grad)
            assert relative_error(parameter.grad, expected.grad) < 1e-10, name
        for name, buffer in whole.named_buffers():
            assert relative_error(parts.get_buffer(name), buffer) < 1e-10, name
    torch.distributed.destroy_process_group()


@pytest.mark.gpu
def test_two_processes_on_a_gpu_follow_one(even_noise, tmp_path):
    """The recipe with its BatchNorms, which become SyncBatchNorms.

    Products are in float32; SpeechBrain would allow TF32, and PyTorch does for convolutions.
    """
    for name, launcher, batch_size in (
        ("one", (sys.executable,), 4),
        ("two", TORCHRUN, 2),
    ):
        argv = distributed_arguments(even_noise, tmp_path / f"{name}_output", batch_size)
        argv = [*on_gpu(argv), "--distributed_backend=gloo"]
        run = {"record": tmp_path / name, "script": "train_ctc", "argv": argv}
        process = start(tmp_path, run, launcher=launcher, NVIDIA_TF32_OVERRIDE="0")
        output = process.communicate(timeout=200)[0]
        assert process.returncode == 0, output
    ranks = [lines(tmp_path / "two", rank) for rank in (0, 1)]
    means = [(first["loss"] + second["loss"]) / 2 for first, second in zip(*ranks, strict=True)]
    assert means == pytest.approx([whole["loss"] for whole in lines(tmp_path / "one")], rel=1e-4)
    expected = weights(tmp_path / "one")
    for rank in (0, 1):
        for name, weight in weights(tmp_path / "two", rank).items():
            assert relative_error(weight, expected[name]) < 1e-3, name


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precisions_on_a_gpu(even_noise, tmp_path, precision, monkeypatch):
    """With all augmentations, the resampling of speed perturbation on the GPU."""
    resampled_on = set()

    def record(self, waveforms):
        if len(waveforms) > 1:  # not the trial before any work
            resampled_on.add(waveforms.device.type)
        return original(self, waveforms)

    original = Resample.forward
    monkeypatch.setattr(Resample, "forward", record)
    augmentations = [f"--enable_{name}=True" for name in ("speed_perturb", "drop_freq")]
    argv = distributed_arguments(even_noise, tmp_path / "output", batch_size=2)
    argv = [*on_gpu(argv), *augmentations, f"--precision={precision}"]
    record_run(tmp_path / "run", "train_ctc", argv)
    losses = [batch["loss"] for batch in lines(tmp_path / "run")]
    assert len(losses) == 12 and np.isfinite(losses).all()
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    for name, weight in weights(tmp_path / "run").items():
        assert weight.isfinite().all() and weight.device.type == "cuda", name
    assert resampled_on == {"cuda"}


@pytest.mark.gpu
def test_killed_run_resumes_on_a_gpu(noise, nan_manifests, tmp_path):
    """In fp16, with the scaler's state. GPU kernels add in any order, so losses are close only."""
    argv = [*killed_arguments(noise, nan_manifests)["dynamic"], "--precision=fp16"]
    run = {"record": tmp_path / "run", "script": "train_ctc", "argv": on_gpu(argv)}
    run["argv"].append(f"--output_folder={tmp_path}/output")
    process = start(tmp_path, run | {"kill_in_checkpoint": 8})
    output = process.communicate(timeout=200)[0]
    assert process.returncode == -signal.SIGKILL, output
    before = lines(tmp_path / "run")
    record_run(**run)
    after = lines(tmp_path / "run")[len(before) :]
    run["argv"][-1] = f"--output_folder={tmp_path}/undisturbed_output"
    record_run(tmp_path / "undisturbed", "train_ctc", run["argv"])
    undisturbed = lines(tmp_path / "undisturbed")
    resumed = before[: len(undisturbed) - len(after)] + after
    assert 0 < len(after) < len(undisturbed)
    assert [batch["ids"] for batch in resumed] == [batch["ids"] for batch in undisturbed]
    losses = [[batch["loss"] for batch in batches] for batches in (resumed, undisturbed)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
