"""The command line: results in files, and errors that a user can act on."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import pytest
import torch

from mgd.cli import main as cli
from mgd.cli import plan as planning
from mgd.cli.doctor import describe, examine
from mgd.errors import BadData
from mgd.recipes import data


def run(capsys, *arguments, code=0):
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    assert (end.value.code or 0) == code, out.err
    return out.out, out.err


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_help_names_every_command(capsys):
    out, _ = run(capsys, "--help")
    assert all(name in out for name in ("demo", "doctor", "plan", "bench", "profile", "--debug"))


def test_the_module_of_the_command_line_imports_no_heavy_package():
    # The package mgd itself may; what cli and options add must not.
    code = (
        "import pathlib, sys, types; package = types.ModuleType('mgd');"
        f"package.__path__ = [str(pathlib.Path({cli.__file__!r}).parents[1])]; sys.modules['mgd'] = package;"
        "import mgd.cli.main; print(sorted({'torch', 'numpy', 'matplotlib', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_demo_writes_pictures_and_json(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(data.images, "FASHION_MNIST", tmp_path / "not-there")
    out, _ = run(
        capsys, "demo", "--steps", 8, "--seed", 3, "--out", tmp_path / "out", "--json", tmp_path / "j" / "d.json"
    )
    report = json.loads((tmp_path / "j" / "d.json").read_text())
    assert (report["command"], report["steps"], report["seed"]) == ("demo", 8, 3)
    assert report["data"]["name"] == "digits" and report["check"]["passed"] is True
    assert f"{report['value']:.4f}" in out
    assert (tmp_path / "out" / "index.html").stat().st_size > 50_000
    assert str(tmp_path / "out" / "most-harmful.png") in out.replace("\n", "")


def test_a_failed_check_is_a_failure_of_the_command(capsys, tmp_path, monkeypatch):
    from mgd.check import CheckResult
    from mgd.recipes.demo import recipe

    def run_nothing(*args):
        return types.SimpleNamespace(check=CheckResult({}, 0.0, (), 0, 0.0, 0.0, 0.0), to_dict=dict)

    monkeypatch.setattr(recipe, "run", run_nothing)
    monkeypatch.setattr(CheckResult, "passed", False)
    monkeypatch.setattr("mgd.cli.main.Session.finish", lambda *args: None)
    monkeypatch.setattr("mgd.recipes.demo.report.page", lambda found: None)
    run(capsys, "demo", code=1)


def test_a_users_error_is_one_paragraph_and_exit_code_2(capsys, tmp_path):
    out, err = run(capsys, "demo", "--data", tmp_path / "nowhere", code=2)
    assert out == "" and "Traceback" not in err
    assert err.startswith("error: expected a folder with a data set; ") and err.count("\n") == 1
    assert "nowhere is not one" in err and "apt-get install dataset-fashion-mnist" in err


@pytest.mark.parametrize("position", [0, 1, 3])
def test_debug_shows_the_traceback_wherever_it_stands(tmp_path, position):
    arguments = ["demo", "--data", str(tmp_path / "nowhere")]
    with pytest.raises(BadData):
        cli.main([*arguments[:position], "--debug", *arguments[position:]])


def test_a_file_that_cannot_be_written_is_a_users_error(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    _, err = run(capsys, "doctor", "--json", tmp_path / "file" / "x.json", code=2)
    assert err.startswith("error: ") and str(tmp_path / "file") in err


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    def fail():
        raise ZeroDivisionError

    monkeypatch.setattr("mgd.cli.doctor.examine", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_kernel_errors_are_users_errors(capsys, monkeypatch):
    from mgd_kernels import dispatch

    monkeypatch.setattr("mgd.cli.doctor.examine", lambda: dispatch.load("quantum"))
    _, err = run(capsys, "doctor", code=2)
    assert err.startswith("error: expected a backend among reference") and "Traceback" not in err


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_says_what_is_there(capsys, tmp_path):
    out, _ = run(capsys, "doctor", "--json", tmp_path / "doctor.json")
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert found["versions"]["torch"] == found["torch"] == torch.__version__
    assert found["backends"]["reference"] is None
    assert 0 < found["free_memory_bytes"] < 2**50
    assert found["data_sets"]["digits"] is None
    assert found["extension"]["isa"] in (None, *found["extension"]["isas"])
    for text in (torch.__version__, "reference", "free disk", *found["processor"]["features"]):
        assert text in out


def test_doctor_says_what_to_do_where_something_is_missing(monkeypatch, tmp_path):
    from mgd_kernels.backends import cpu

    reason = "the extension module does not load; build it with `pip install .`"
    monkeypatch.setattr(cpu, "unavailable", lambda: reason)
    monkeypatch.setattr(data.images, "FASHION_MNIST", tmp_path / "not-there")
    text = describe(examine())
    assert f"not available: {reason}" in text
    assert "apt-get install dataset-fashion-mnist" in text


# --- plan ------------------------------------------------------------------------------------------------------------


def test_plan_counts_the_sizes_of_the_optimizer(capsys, tmp_path):
    file = tmp_path / "plan.json"
    out, _ = run(
        capsys, "plan", "--steps", 100, "--parameters", "1.5M", "--optimizer", "adamw", "--dtype", "bfloat16",
        "--budget", "host=100MB", "--budget", "disk=runs/x:1GB", "--step-seconds", 0.5, "--json", file,
    )  # fmt: skip
    plan = json.loads(file.read_text())
    sizes = {"snapshot": 3 * 4 * 1_500_000, "gradient": 2 * 1_500_000}
    assert plan["sizes"] == {**sizes, "residuals": 0, "memory": "host"}
    assert plan["limits"] == {"host": 100_000_000, "disk": 1_000_000_000}
    assert plan["directory"] == "runs/x" and plan["costs"]["step"] == 0.5
    assert "100 training steps" in out


def test_plan_forecasts_a_training_on_many_ranks(capsys, tmp_path):
    file = tmp_path / "plan.json"
    arguments = ["--ranks", 64, "--parameters", "1B", "--steps", 1000, "--device", "h200", "--network", "400Gb"]
    out, _ = run(capsys, "plan", *arguments, "--tokens", "1M", "--json", file)
    found = json.loads(file.read_text())
    assert "64 ranks" in out and found["network_bytes_per_second"] == 50e9 and found["fits"]
    assert found["plan"]["sizes"]["gradient"] == 2 * 10**9 // 64 and found["tokens_per_step"] == 10**6
    assert planning.parse_rate("50GB") == planning.parse_rate("400 Gb/s") == 50e9


def test_plan_draws_its_schedule(capsys, tmp_path):
    run(capsys, "plan", "--steps", 30, "--parameters", "1k", "--budget", "host=60kB", "--out", tmp_path / "p")
    assert (tmp_path / "p" / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "30 training steps" in (tmp_path / "p" / "index.html").read_text()


def test_a_plan_too_long_to_draw_still_gets_its_page(capsys, tmp_path):
    run(capsys, "plan", "--steps", 1_000_000, "--parameters", "1k", "--budget", "host=200MB", "--out", tmp_path / "p")
    assert "too many to draw" in (tmp_path / "p" / "index.html").read_text()
    assert not (tmp_path / "p" / "plan.png").exists()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--parameters", "many"], "expected a number of parameters"),
        (["--parameters", "0"], "expected a number of parameters"),
        (["--parameters", "1M", "--budget", "ram=1GB"], "a tier among device, host, disk"),
        (["--parameters", "1M", "--budget", "host=1GB", "--budget", "host=2GB"], "each tier once"),
        (["--parameters", "1M", "--budget", "host=lots"], "expected a size such as"),
        (["--parameters", "1M", "--budget", "host=1kB"], "the least budget that works"),
        (["--parameters", "1M", "--schedule", "magic"], "expected schedule"),
        (["--parameters", "1M", "--optimizer", "lion"], "expected an optimizer among"),
        (["--parameters", "1M", "--dtype", "int8"], "expected a dtype among"),
        (["--parameters", "1M", "--ranks", "4", "--device", "abacus"], "expected a device among"),
        (["--parameters", "1M", "--ranks", "4", "--network", "400"], "expected a rate such as"),
        (["--parameters", "1M", "--ranks", "4", "--step-seconds", "1"], "no --step-seconds"),
        (["--parameters", "1M", "--tokens", "1M"], "expected --ranks"),
        (["--parameters", "1M", "--ranks", "4", "--tokens", "0"], "expected a number of tokens of a step (--tokens)"),
        (["--parameters", "1M", "--ranks", "100000000"], "expected at most 1,000,000 ranks"),
        (["--parameters", "1M", "--step-seconds", "inf"], "above 0 and finite"),
        (["--parameters", "1M", "--steps", "100000000000000000000"], "expected at most 10,000,000,000 steps"),
    ],
)
def test_what_plan_cannot_use_is_named(capsys, arguments, says):
    _, err = run(capsys, "plan", "--steps", "10", *arguments, code=2)
    assert says in " ".join(err.replace("│", " ").split()) and "Traceback" not in err


@pytest.mark.parametrize(
    "text, count", [("124M", 124_000_000), ("1.5b", 1_500_000_000), ("7_000", 7000), (" 3 k", 3000)]
)
def test_counts_are_read_as_people_write_them(text, count):
    assert planning.parse_count(text) == count


# --- sub-apps --------------------------------------------------------------------------------------------------------


def test_a_registered_command_is_imported_when_asked_for(capsys, monkeypatch):
    module = types.ModuleType("registered_here")

    def command(size: int = 3) -> None:
        """Measures nothing."""
        print(f"size {size}")

    module.command = command
    monkeypatch.setitem(sys.modules, "registered_here", module)
    monkeypatch.setitem(cli.BENCHMARKS, "nothing", "registered_here")
    assert run(capsys, "bench", "nothing", "--size", 5)[0] == "size 5\n"
    assert "Measures nothing." in run(capsys, "bench", "--help")[0]
    assert "No such command" in run(capsys, "bench", "something", code=2)[1]


@pytest.mark.parametrize("group", ["bench", "recipe"])
def test_every_registered_command_has_help(capsys, group):
    for name in {"bench": cli.BENCHMARKS, "recipe": cli.RECIPES}[group]:
        assert "--json" in run(capsys, group, name, "--help")[0]
