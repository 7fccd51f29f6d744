"""Options and libraries of engines: what is taken, what is refused, and that nothing is imported for it."""

import importlib.util
import math
import subprocess
import sys

import pytest
from optuna_kit import ENGINES, spec_of

from holdfast.core.errors import MissingLibrary, SpecError
from holdfast.engines import options as options_module
from holdfast.engines.options import OPTIONS, check_libraries, check_objectives, check_options
from holdfast.engines.optuna_engine import make


@pytest.mark.parametrize(
    ("engine", "options", "message"),
    [
        (
            "tpe",
            {"n_startup_trial": 3},
            r"n_startup_trial \(did you mean 'n_startup_trials'\?\) is no option of the engine tpe",
        ),
        ("tpe", {"n_startup_trials": -1}, "n_startup_trials is -1; allowed: a whole number from 0 on"),
        ("tpe", {"n_startup_trials": True}, "n_startup_trials is True; allowed: a whole number"),
        ("tpe", {"n_ei_candidates": 2.0}, "n_ei_candidates is 2.0; allowed: a whole number from 1 on"),
        ("tpe", {"multivariate": 1}, "multivariate is 1; allowed: true or false"),
        ("tpe", {"group": True, "multivariate": False}, "group: true and multivariate: false exclude each other"),
        ("tpe", {"seed": 1}, "seed.* is no option of the engine tpe; its options: n_startup_trials"),
        ("gp", {"n_startup_trials": 0}, "from 1 on"),
        ("gp", {"deterministic_objective": None}, "deterministic_objective is None; allowed: true or false"),
        ("cmaes", {"sigma0": math.inf}, "sigma0 is inf"),
        ("cmaes", {"sigma0": 0}, "sigma0 is 0"),
        ("cmaes", {"popsize": 3}, "popsize is 3; allowed: a whole number from 4 on, or null"),
        ("cmaes", {"use_separable_cma": True, "with_margin": True}, "exclude each other; drop one"),
        ("cmaes", {"lr_adapt": True, "with_margin": True}, "exclude each other"),
        ("cmaes", {"lr_adapt": True, "use_separable_cma": True}, "exclude each other"),
        ("nsga2", {"population_size": 1}, "from 2 on"),
        ("nsga2", {"mutation_prob": 1.5}, r"mutation_prob is 1.5; allowed: a number in \[0, 1\], or null"),
        ("nsga2", {"dividing_parameter": 3}, "no option of the engine nsga2"),
        ("nsga3", {"dividing_parameter": 0}, "from 1 on"),
        ("nsga3", {"crossover_prob": "0.5"}, "crossover_prob is '0.5'"),
        ("random", {"seed": 1}, "no option of the engine random; its options: none"),
    ],
)
def test_wrong_options_are_refused(engine, options, message):
    with pytest.raises(SpecError, match=message):
        check_options(engine, options)
    if engine in ENGINES:
        with pytest.raises(SpecError, match=message):
            make(spec_of(engine, "one", options=options), 1)


EVERY = {bool: True, int: 5, float: 0.5}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_option_is_taken(engine):
    for name, option in OPTIONS[engine].items():
        for value in [EVERY[option.kind]] + [None] * option.optional:
            check_options(engine, {name: value})
            make(spec_of(engine, "mixed", options={name: value}), 1).propose(0)
    check_options("file.py:Mine", {"anything": object()})


def test_absent_libraries_are_named_with_their_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        options_module.importlib.util, "find_spec", lambda name: None if name in ("torch", "scipy", "cmaes") else find(name)
    )
    with pytest.raises(MissingLibrary, match=r"gp needs torch and scipy, not installed here: pip install 'holdfast\[gp\]'"):
        check_libraries("gp")
    with pytest.raises(MissingLibrary, match=r"cmaes needs cmaes, .* 'holdfast\[cmaes\]'"):
        make(spec_of("cmaes"), 1)
    for engine in ("tpe", "nsga2", "nsga3", "random", "mine.py:Mine"):
        check_libraries(engine)


def test_several_objectives_are_checked():
    with pytest.raises(SpecError, match="one objective, the spec has 2; use tpe"):
        check_objectives("cmaes", 2)
    for engine in ENGINES:
        check_objectives(engine, 1)
        if engine != "cmaes":
            check_objectives(engine, 3)


def test_checks_import_no_library():
    code = (
        "import sys; from holdfast.engines.options import *; check_options('gp', {'n_startup_trials': 3});"
        "check_libraries('gp'); check_libraries('cmaes'); check_objectives('nsga2', 2);"
        "assert not {'optuna', 'torch', 'scipy', 'cmaes', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
