"""User-defined reward functions, found by their dotted path."""

import importlib
import inspect

from megatron_cpgd.errors import ConfigError
from megatron_cpgd.rewards.base import RewardFunction


def load_function(path: str) -> RewardFunction:
    """The function at `package.module.function`; imports its module.

    Raises:
        ConfigError: no such module or attribute, a module that fails, or a wrong signature.
    """
    where = f"rewards.functions: path {path!r}"
    module_name, _, attribute = path.rpartition(".")
    if not module_name:
        raise ConfigError(f"{where}: expected package.module.function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{where}: there is no module {error.name!r}; install it or add its folder to "
                "PYTHONPATH"
            ) from error
        raise ConfigError(f"{where}: importing {module_name!r} failed: {error}") from error
    except Exception as error:  # any error of the user's module
        raise ConfigError(
            f"{where}: importing {module_name!r} failed: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, attribute, None)
    if function is None:
        raise ConfigError(f"{where}: module {module_name!r} has no attribute {attribute!r}")
    _check_signature(function, where)
    return function  # type: ignore[no-any-return]


def _check_signature(function: object, where: str) -> None:
    expected = "expected a function (response, answer, fields) -> float"
    if not callable(function):
        raise ConfigError(f"{where}: {expected}, got {type(function).__name__}")
    try:
        inspect.signature(function).bind("response", "answer", {})
    except TypeError as error:
        raise ConfigError(
            f"{where}: {expected}, got {inspect.signature(function)}: {error}"
        ) from error
    except ValueError:
        pass  # some built-in callables have no signature to check
