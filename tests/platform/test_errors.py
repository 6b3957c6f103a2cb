import inspect
import pickle

import pytest

from kintsugi import errors
from kintsugi.errors import ImageError, KintsugiError


def _all_errors() -> list[type[KintsugiError]]:
    return [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, KintsugiError)]


def test_every_exception_of_the_module_is_a_kintsugi_error() -> None:
    raised = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, BaseException)]
    assert set(raised) == set(_all_errors())


def test_the_tree_in_the_docstring_names_every_error() -> None:
    drawn = set((errors.__doc__ or "").replace("├", " ").replace("└", " ").replace("─", " ").split())
    assert {kind.__name__ for kind in _all_errors()} <= drawn


@pytest.mark.parametrize("kind", [kind for kind in _all_errors() if kind is not ImageError])
def test_errors_survive_the_way_through_another_process(kind: type[KintsugiError]) -> None:
    copied = pickle.loads(pickle.dumps(kind("say what to do")))
    assert type(copied) is kind
    assert str(copied) == "say what to do"


def test_image_errors_keep_their_code_through_another_process() -> None:
    copied = pickle.loads(pickle.dumps(ImageError("too_large", "cut it")))
    assert (copied.code, str(copied)) == ("too_large", "cut it")
