import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deltamux import __version__
from deltamux.cli import COMMANDS, main
from deltamux.cli.generate import Generate
from deltamux.cli.serve import Serve
from deltamux.demo.tasks import weights_path

ADAPTER = str(weights_path() / "adapters" / "rot13")


def run(*arguments: str) -> int:
    return main(arguments)


def parse(*arguments: str) -> Serve:
    return Serve.parse("deltamux serve", arguments)


def test_overview_names_every_command(capsys):
    assert run() == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert run("--version") == 0
    assert capsys.readouterr().out == f"deltamux {__version__}\n"


@pytest.mark.parametrize(
    "command",
    ["serve", "generate", "extract", "convert", "inspect", "verify", "demo", "health", "bench"],
)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(command, "--help")
    assert exit_.value.code == 0
    assert f"deltamux {command}" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["list", "load", "unload", "pin", "unpin"])
def test_every_verb_of_adapters_has_help(verb, capsys):
    assert run("adapters") == 0
    assert f"\n  {verb} " in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        run("adapters", verb, "--help")
    assert exit_.value.code == 0


def test_help_speaks_in_our_words(capsys):
    with pytest.raises(SystemExit):
        run("bench", "--help")
    assert "['inf']" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("serve", "--help")
    text = capsys.readouterr().out
    assert not re.search(r"None|factory|dict|ByteSize|\|[a-z]", text)
    assert "--adapter NAME=PATH " in text
    assert "(default: 4GiB)" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serv"], "deltamux: unknown command 'serv'; did you mean serve?"),
        (["adapters", "lst"], "deltamux adapters: unknown command 'lst'; did you mean list?"),
        (
            ["serve", "--model", "m", "--prot", "3"],
            "deltamux serve: unknown option --prot; did you mean --port?",
        ),
        (["serve", "--model", "m", "--xyzzy=3"], "deltamux serve: unknown option --xyzzy"),
        (["serve", "--model", "m", "extra"], "deltamux serve: unknown argument extra"),
        (["serve"], "deltamux serve: --model is required"),
        (["serve", "--model"], "deltamux serve: --model: expected one argument"),
        (
            ["serve", "--model", "m", "--port", "70000"],
            "deltamux serve: --port 70000: input should be less than or equal to 65535",
        ),
        (
            ["serve", "--model", "m", "--adapter", "no-path"],
            "deltamux serve: --adapter no-path: expected NAME=PATH",
        ),
        (
            ["serve", "--model", "m", "--adapter", "no-path="],
            "deltamux serve: --adapter no-path=: expected NAME=PATH",
        ),
        (
            ["serve", "--model", "m", "--adapter", "a=/x", "--adapter", "a=/y"],
            "deltamux serve: --adapter a=/y: a is given twice",
        ),
        (
            ["serve", "--model", "m", "--kv-cache-bytes", "lots"],
            "deltamux serve: --kv-cache-bytes lots: "
            "expected a size: 4GiB, 500MB or a number of bytes",
        ),
        (
            ["inspect", "a", "--dtype", "int4"],
            "deltamux inspect: --dtype int4: "
            "input should be 'auto', 'float32', 'bfloat16' or 'float16'",
        ),
        (
            ["serve", "--model", "m", "--device", "tpu"],
            "deltamux serve: --device tpu: expected cpu, cuda, cuda:N or auto",
        ),
        (
            ["serve", "--model", "m", "--adapter-dir", ""],
            "deltamux serve: --adapter-dir: the value is empty",
        ),
        (["inspect", "a", "--model="], "deltamux inspect: --model: the value is empty"),
        (
            ["bench", "--request-rate", "5", "--request-rate", "fast"],
            "deltamux bench: --request-rate fast: expected a positive number, or inf",
        ),
        (
            ["bench", "--input-len", "x"],
            "deltamux bench: --input-len x: "
            "expected a number of tokens, or LOW:HIGH, from 1 on and rising",
        ),
        (
            ["bench", "--popularity", "fair"],
            "deltamux bench: --popularity fair: expected identical, distinct, uniform or zipf:A",
        ),
        (
            ["bench", "--goodput", "ttft"],
            "deltamux bench: --goodput ttft: expected milliseconds behind ttft:",
        ),
        (
            ["bench", "--burstiness", "inf"],
            "deltamux bench: --burstiness inf: input should be a finite number",
        ),
        (
            ["bench", "--base", "--adapter", "a"],
            "deltamux bench: --base and --adapter exclude each other",
        ),
        (
            ["bench", "--vocab-size", "9"],
            "deltamux bench: --vocab-size is for --backend openai: a deltamux server tells",
        ),
        (
            ["bench", "--backend", "openai", "--admin-target", "x:1"],
            "deltamux bench: --admin-target is for --backend deltamux",
        ),
        (["generate", ""], "deltamux generate: PROMPT is required"),
        (
            ["generate", "hello", "--max-tokens", "4294967296"],
            "deltamux generate: Value out of range: 4294967296",
        ),
        (
            ["generate", "\udcff"],
            "deltamux generate: 'utf-8' codec can't encode character '\\udcff' in position 0: "
            "surrogates not allowed",
        ),
        (
            ["generate", "hello", "--temperature", "-1"],
            "deltamux generate: --temperature -1: input should be greater than or equal to 0",
        ),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == message + "\n"
    assert captured.out == ""


def test_flags_become_configurations(tmp_path):
    options = parse(
        *("--model", "m", "--port", "0", "--device", "cpu", "--max-num-seqs", "3"),
        *("--adapter", "a=/x/y", "--adapter", "b=/z=w", "--adapter-dir", str(tmp_path)),
        *("--kv-cache-bytes", "2GiB", "--adapter-host-bytes", "100MB", "--no-metrics"),
    )
    assert options.engine().max_num_seqs == 3
    assert options.engine().kv_cache_bytes == 2 << 30
    assert options.engine().adapter_host_bytes == 100_000_000
    assert options.store().adapters == {"a": "/x/y", "b": "/z=w"}
    assert options.store().adapter_dir == tmp_path
    assert options.frontend().port == 0
    assert options.frontend().metrics_port is None
    assert options.frontend().model == options.engine().model == "m"


def test_every_configured_field_has_a_flag():
    """A field that no flag reaches would be a constant in disguise."""
    low, high = (
        parse("--model", "m"),
        parse(
            *("--model", "n", "--host", "::", "--port", "1", "--metrics-port", "2"),
            *("--admin-port", "3", "--no-reflection", "--device", "cuda:1", "--dtype", "float16"),
            *("--threads", "2", "--seed", "1", "--max-model-len", "9", "--max-num-seqs", "9"),
            *(
                "--max-num-batched-tokens",
                "9",
                "--block-size",
                "8",
                "--gpu-memory-utilization",
                "0.5",
            ),
            *("--kv-cache-bytes", "9", "--max-adapter-slots", "9", "--adapter-device-bytes", "9"),
            *(
                "--adapter-host-bytes",
                "9",
                "--adapter-cache-dir",
                "/c",
                "--adapter-disk-bytes",
                "9",
            ),
            *("--max-adapter-bytes", "9", "--max-waiting-requests", "9", "--default-deadline", "9"),
            *("--drain-grace", "9", "--log-format", "json", "--log-level", "debug"),
            *("--adapter", "a=b", "--adapter-dir", "/d", "--no-enable-prefix-caching"),
            "--enforce-eager",
        ),
    )
    for role in ("engine", "frontend", "store"):
        before, after = getattr(low, role)(), getattr(high, role)()
        same = [name for name in vars(before) if getattr(before, name) == getattr(after, name)]
        assert same == []


def test_environment_is_read_after_flags(monkeypatch):
    monkeypatch.setenv("DELTAMUX_MODEL", "from-environment")
    monkeypatch.setenv("DELTAMUX_PORT", "1234")
    assert parse().frontend().model == "from-environment"
    assert parse("--port", "4321").frontend().port == 4321


@pytest.mark.parametrize(
    "text", ["a,b", " end ", "\n", "[x", '{"a": 1}', 'say "x"', "back\\", '\\"', "null", "1", "é"]
)
def test_a_repeated_word_is_taken_as_it_stands(text):
    options = Generate.parse("deltamux generate", ["hello", "--stop", text, "--stop", "b"])
    assert options.stop == [text, "b"]
    folders = parse("--model", "m", "--adapter", f"n={text}", "--adapter", "b=/y").adapter
    assert {name: str(path) for name, path in folders.items()} == {"n": text, "b": "/y"}


def test_what_is_repeatable_is_json_in_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("DELTAMUX_MODEL", "m")
    monkeypatch.setenv("DELTAMUX_ADAPTER", '{"a": "/x", "b": "/y"}')
    assert parse().store().adapters == {"a": "/x", "b": "/y"}
    for text in ("a=/x", '["a"]', '{"a": 1}'):
        monkeypatch.setenv("DELTAMUX_ADAPTER", text)
        assert run("serve") == 2
        expected = 'deltamux serve: DELTAMUX_ADAPTER: expected JSON, {"NAME": "PATH"}\n'
        assert capsys.readouterr().err == expected
    for text in ("end", '"end"', "[1]"):
        monkeypatch.setenv("DELTAMUX_STOP", text)
        assert run("generate", "hello") == 2
        expected = 'deltamux generate: DELTAMUX_STOP: expected JSON, ["TEXT"]\n'
        assert capsys.readouterr().err == expected


def test_an_error_names_the_variable_that_it_is_in(monkeypatch, capsys):
    monkeypatch.setenv("DELTAMUX_PORT", "70000")
    assert run("serve", "--model", "m") == 2
    assert capsys.readouterr().err == (
        "deltamux serve: DELTAMUX_PORT 70000: input should be less than or equal to 65535\n"
    )
    assert run("serve", "--model", "m", "--port=-1") == 2
    assert capsys.readouterr().err.startswith("deltamux serve: --port -1: ")


def test_json_is_called_so_in_the_environment_too(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DELTAMUX_JSON", "1")
    assert run("inspect", str(tmp_path)) == 1
    assert json.loads(capsys.readouterr().out)["refusal"]["reason"] == "MISSING_CONFIG"
    assert run("inspect", str(tmp_path), "--no-json") == 1
    assert "(MISSING_CONFIG)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["serve", "--model"], ["inspect", ADAPTER, "--model"], ["bench", "--save-json"]],
)
def test_a_path_that_cannot_be_looked_at_is_one_line(arguments, capsys):
    """As a folder that only another user may open; this one is so for root too."""
    path = "/" + "x" * 300
    assert run(*arguments, path) == 1
    error = capsys.readouterr().err
    assert error == f"deltamux {arguments[0]}: {path}: File name too long\n"


def test_unreachable_server_is_one_line(capsys):
    assert run("generate", "hello", "--target", "127.0.0.1:1", "--timeout", "5") == 1
    assert re.fullmatch(r"deltamux generate: UNAVAILABLE: [^\n]+\n", capsys.readouterr().err)
    assert run("adapters", "list", "--target", "127.0.0.1:1", "--timeout", "5") == 1
    assert re.fullmatch(r"deltamux adapters list: UNAVAILABLE: [^\n]+\n", capsys.readouterr().err)
    assert run("health", "--target", "127.0.0.1:1") == 1


def test_client_commands_and_the_front_end_load_no_torch():
    """The commands start fast, and run where only the client's half of the dependencies works; the
    front end starts the engine before it loads what takes seconds."""
    code = (
        "import sys, deltamux.cli.generate, deltamux.cli.adapters, deltamux.cli.health;"
        "import deltamux.launch.serve;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    root = Path(__file__).parents[1]
    path = os.pathsep.join((str(root / "server"), str(root / "kernels")))
    environment = {**os.environ, "PYTHONPATH": path}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


@pytest.mark.parametrize("flag", ["--save-json", "--save-png"])
def test_bench_does_not_measure_what_it_could_not_write(flag, tmp_path, capsys):
    for path in (tmp_path, tmp_path / "missing" / "figures"):
        assert run("bench", "--target", "localhost:1", flag, str(path)) == 2
        assert f"{path} cannot be written" in capsys.readouterr().err


def test_bench_does_not_measure_what_it_could_not_draw(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("bench", "--target", "localhost:1", "--save-png", str(tmp_path / "load.png")) == 1
    assert capsys.readouterr().err == "deltamux bench: needs matplotlib: the extra 'bench'\n"
