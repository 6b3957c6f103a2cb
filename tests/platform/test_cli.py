import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from kintsugi import cli
from kintsugi.cli import COMMANDS, GROUPS, Table, main, resolve

HEAVY = ("torch", "ray", "cv2", "boto3", "numpy", "kintsugi.commands")
FAKE = '''
from typing import Annotated
import typer
from kintsugi.commands.console import Json, print_json
from kintsugi.errors import ConfigError, KintsugiError

def greet(name: str, times: Annotated[int, typer.Option(help="How often.")] = 1) -> None:
    """Say hello."""
    print(" ".join([f"hello {name}"] * times))

def refuse() -> None:
    """Cannot work."""
    raise ConfigError("turn the key")

class RemoteError(KintsugiError):
    """What Ray makes of an error of a worker."""
    def __init__(self, cause: KintsugiError) -> None:
        super().__init__("a long remote traceback")
        self.cause = cause

def refuse_remotely() -> None:
    raise RemoteError(ConfigError("turn the key"))

def interrupted() -> None:
    raise KeyboardInterrupt

def fall_over() -> None:
    raise RuntimeError("a fault of ours")

def tell(as_json: Json = False) -> None:
    """Tell what was found, while a library speaks too."""
    print("a worker says something")
    if as_json:
        print_json({"found": 1})
    print("a node says something")

def search(space: Annotated[str | None, typer.Argument()] = None, config: str = "none", wide: bool = False) -> None:
    """Search far."""
    print(f"search {space} from {config}" + " widely" * wide)
'''
TABLE: Table = {
    "greet": ("fake_commands:greet", "Say hello to someone."),
    "refuse": ("fake_commands:refuse", "Refuse."),
    "refuse-remotely": ("fake_commands:refuse_remotely", "Refuse on a worker."),
    "tell": ("fake_commands:tell", "Tell what was found."),
    "interrupted": ("fake_commands:interrupted", "Be interrupted."),
    "fall-over": ("fake_commands:fall_over", "Fall over."),
    "data greet": ("fake_commands:greet", "Say hello in a group."),
    "data absent": ("no_such_module:absent", "Never loaded."),
    "search": ("fake_commands:search", "Search for something."),
    "search greet": ("fake_commands:greet", "Say hello below a verb."),
    "search refuse": ("fake_commands:refuse", "Refuse below a verb."),
}


@pytest.fixture(autouse=True)
def _fake_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake_commands.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "fake_commands", raising=False)


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", [["--help"], ["data", "--help"], ["models", "-h"], [], ["--version"], ["trian"]])
def test_help_and_usage_errors_load_nothing_heavy(words: list[str]) -> None:
    code = f"import sys; from kintsugi.cli import main; main({words}); print([m for m in {HEAVY} if m in sys.modules])"
    assert _python(code).stdout.splitlines()[-1] == "[]"


def test_the_help_page_lists_every_command_without_loading_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"], TABLE) == 0
    page = capsys.readouterr().out
    assert all(name in page for name in ("greet", "Say hello to someone.", "refuse", "data"))
    assert main(["data", "--help"], TABLE) == 0
    assert "Never loaded." in capsys.readouterr().out
    assert "fake_commands" not in sys.modules


def test_a_command_gets_its_arguments_and_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["greet", "Ada", "--times", "2"], TABLE) == 0
    assert capsys.readouterr().out == "hello Ada hello Ada\n"


def test_a_command_of_a_group_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "greet", "Ada"], TABLE) == 0
    assert capsys.readouterr().out == "hello Ada\n"


def test_the_help_of_a_command_shows_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "greet", "--help"], TABLE) == 0
    page = capsys.readouterr().out
    assert "kintsugi data greet" in page
    assert "How often." in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["search", "space.yaml", "--config", "x.yaml"], "search space.yaml from x.yaml\n"),
        (["search", "--config", "x.yaml", "space.yaml"], "search space.yaml from x.yaml\n"),
        (["search", "--wide"], "search None from none widely\n"),
        (["search", "--config", "greet"], "search None from greet\n"),
        (["search", "./greet"], "search ./greet from none\n"),
        (["search", "--", "greet"], "search greet from none\n"),
        (["search", "greet", "Ada", "--times", "2"], "hello Ada hello Ada\n"),
        (["search", "greet", "search"], "hello search\n"),
    ],
)
def test_a_verb_with_others_below_it_runs_itself_or_one_of_them(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words, TABLE) == 0
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("words", [["search"], ["search", "-h"], ["search", "--help"]])
def test_a_verb_with_others_below_it_shows_its_own_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words, TABLE) == 0
    page = capsys.readouterr().out
    assert "kintsugi search" in page and "Search far." in page and "--config" in page
    assert main(["search", "greet", "--help"], TABLE) == 0
    page = capsys.readouterr().out
    assert "kintsugi search greet" in page and "How often." in page and "--config" not in page


def test_the_help_page_lists_a_verb_with_others_below_it_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"], TABLE) == 0
    page = capsys.readouterr().out
    assert page.count("Search for something.") == 1 and "below a verb" not in page


def test_a_refusal_below_a_verb_is_one_sentence_and_verbose_shows_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "refuse"], TABLE) == 1
    assert capsys.readouterr() == ("", "error: turn the key\n")
    assert main(["search", "refuse", "-v"], TABLE) == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_search_reaches_its_verb_and_what_is_below_it_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KINTSUGI_STORE", str(tmp_path))
    assert main(["tune", str(tmp_path / "space.yaml"), "--config", "none.yaml"]) == 1
    assert "none.yaml: cannot be read" in capsys.readouterr().err
    assert main(["tune", "publish", "nightly"]) == 1
    assert "holds no search nightly" in capsys.readouterr().err
    assert main(["tune", "report"]) == 2
    assert "kintsugi tune report" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["tune"], ["tune", "-h"], ["tune", "--help"], ["tune", "report", "--help"]])
def test_help_of_the_search_loads_neither_torch_nor_ray_nor_optuna(words: list[str]) -> None:
    heavy = ("torch", "ray", "cv2", "boto3", "numpy", "optuna")
    code = f"import sys; from kintsugi.cli import main; main({words}); print([m for m in {heavy} if m in sys.modules])"
    *page, loaded = _python(code).stdout.splitlines()
    assert loaded == "[]" and any("Usage: kintsugi tune" in line for line in page)


@pytest.mark.parametrize("command", ["refuse", "refuse-remotely"])
def test_a_kintsugi_error_is_one_sentence_on_stderr_and_exit_1(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command], TABLE) == 1
    assert capsys.readouterr() == ("", "error: turn the key\n")


@pytest.mark.parametrize("words", [["-v", "refuse"], ["refuse", "-v"], ["--verbose", "refuse"]])
def test_verbose_shows_the_traceback_too(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words, TABLE) == 1
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert "in refuse" in told
    assert told.endswith("error: turn the key\n")


def test_a_fault_of_ours_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["fall-over"], TABLE)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["gret"], "Did you mean 'greet'?"),
        (["data", "gret"], "Did you mean 'greet'?"),
        (["greet"], "Missing argument"),
        (["greet", "Ada", "--times", "many"], "--times"),
        (["greet", "Ada", "--tims", "2"], "No such option"),
        (["search", "--confg", "x"], "No such option"),
        (["search", "--times", "2"], "No such option"),
        (["search", "greet", "Ada", "--config", "x"], "No such option"),
        (["search", "greet"], "Missing argument"),
        (["search", "gret", "Ada"], "unexpected extra argument"),
    ],
)
def test_wrong_usage_ends_with_2_and_a_hint(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words, TABLE) == 2
    assert told in capsys.readouterr().err


def test_a_document_for_machines_stands_alone_whatever_else_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tell", "--json"], TABLE) == 0
    out, err = capsys.readouterr()
    assert out == '{"found": 1}\n'
    assert err == "a worker says something\na node says something\n"
    assert main(["tell"], TABLE) == 0
    assert capsys.readouterr().out == "a worker says something\na node says something\n"


def test_an_interrupt_ends_with_130() -> None:
    assert main(["interrupted"], TABLE) == 130


def test_the_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"kintsugi {cli.__version__}\n"


def test_a_reader_that_went_away_is_no_fault_worth_words() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys; from kintsugi.cli import main; sys.exit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_table_has_its_function_and_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    target, help_line = COMMANDS[command]
    assert callable(resolve(target))
    assert help_line.endswith(".")
    assert main([*command.split(), "--help"]) == 0
    assert f"kintsugi {command}" in capsys.readouterr().out


def test_every_group_of_the_table_is_explained() -> None:
    assert {path.rpartition(" ")[0] for path in COMMANDS} - {"", *COMMANDS} == set(GROUPS)


def test_the_installed_script_is_this_main() -> None:
    (script,) = entry_points(group="console_scripts", name="kintsugi")
    assert script.load() is main
