import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.errors import SpecError
from holdfast.core.resume import Action, Rerun, ResumePolicy, Standing, plan_trial
from holdfast.core.trial import ERRORED, FINISHED, UNFINISHED, Outcome, TrialStatus
from holdfast.testing.samples import sample_trial

DEFAULT = ResumePolicy.from_flags()
LEAVE = ResumePolicy.from_flags(resume_unfinished=False)
RESUME = ResumePolicy.from_flags(resume_errored=True)
RESTART = ResumePolicy.from_flags(restart_errored=True)
POLICIES = (DEFAULT, LEAVE, RESUME, RESTART)


def standing(status, checkpoint=None, **rest):
    given_to_trial = {key: rest.pop(key) for key in ("attempt", "claimed") if key in rest}
    return Standing(trial=sample_trial(0, status, **given_to_trial), checkpoint=checkpoint, **rest)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("status", sorted(FINISHED))
def test_finished_trials_are_kept(status, policy):
    plan = plan_trial(standing(status, (1, 5)), policy)
    assert (plan.action, plan.step, plan.parent) == (Action.KEEP, None, None)


@pytest.mark.parametrize("status", [TrialStatus.RUNNING, TrialStatus.SKIPPED])
def test_interrupted_trials_go_on_from_their_newest_checkpoint(status):
    for policy in (DEFAULT, RESUME, RESTART):
        plan = plan_trial(standing(status, (2, 5), attempt=2), policy)
        assert (plan.action, plan.step, plan.parent) == (Action.RESUME, 5, (2, 5))
        plan = plan_trial(standing(status), policy)
        assert (plan.action, plan.step, plan.parent) == (Action.RESUME, None, None)
        assert "from step 0" in plan.reason
    assert plan_trial(standing(status, (2, 5)), LEAVE).action is Action.SKIP


def test_a_trial_that_never_started_runs():
    for policy in (DEFAULT, RESUME, RESTART):
        assert plan_trial(standing(TrialStatus.PENDING), policy).action is Action.RUN
    assert plan_trial(standing(TrialStatus.PENDING), LEAVE).action is Action.SKIP
    assert plan_trial(standing(TrialStatus.SKIPPED, claimed=False), DEFAULT).action is Action.RUN


def test_a_retry_that_waits_goes_on_from_its_checkpoint():
    plan = plan_trial(standing(TrialStatus.PENDING, (1, 3), attempt=2, claimed=False), DEFAULT)
    assert (plan.action, plan.parent) == (Action.RESUME, (1, 3))


@pytest.mark.parametrize("status", sorted(ERRORED))
def test_errored_trials_do_as_their_own_flag_says(status):
    found = standing(status, (1, 5))
    assert plan_trial(found, DEFAULT).action is Action.KEEP
    assert plan_trial(found, LEAVE).action is Action.KEEP
    assert plan_trial(found, RESUME).parent == (1, 5)
    plan = plan_trial(found, RESTART)
    assert (plan.action, plan.step, plan.parent) == (Action.RESTART, None, None)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_outcome_from_before_the_crash_is_adopted(policy):
    for known in ({"persisted": Outcome.COMPLETED}, {"decided": Outcome.PRUNED}):
        assert plan_trial(standing(TrialStatus.RUNNING, (1, 5), **known), policy).action is Action.ADOPT


def test_reasons_name_the_checkpoints_that_do_not_count():
    plan = plan_trial(standing(TrialStatus.RUNNING, (1, 4), rejected=("step 5: digest differs",)), DEFAULT)
    assert "step 5: digest differs" in plan.reason
    assert "step 4" in plan.reason


def test_lost_is_what_was_reported_beyond_the_checkpoint():
    for status, policy in ((TrialStatus.RUNNING, DEFAULT), (TrialStatus.FAILED, RESUME)):
        assert plan_trial(standing(status, (1, 4), reported=[0, 2, 4, 6, 8]), policy).lost == 2
        assert plan_trial(standing(status, reported=[0, 2]), policy).lost == 2
    assert plan_trial(standing(TrialStatus.FAILED, (1, 4), reported=[4, 5]), RESTART).lost == 2
    assert plan_trial(standing(TrialStatus.FAILED, (1, 4), reported=[4, 5]), DEFAULT).lost == 0


def test_a_trial_whose_files_cannot_be_used_is_left_as_it_is():
    why = {"unusable": "cannot list x: Permission denied"}
    for policy in (*POLICIES, ResumePolicy(unfinished="restart", finished="restart")):
        plan = plan_trial(standing(TrialStatus.RUNNING, **why), policy)
        assert plan.action is Action.SKIP
        assert "Permission denied" in plan.reason
        for status in ERRORED | FINISHED:
            assert plan_trial(standing(status, **why), policy).action is Action.KEEP
    assert plan_trial(standing(TrialStatus.RUNNING, persisted=Outcome.COMPLETED, **why), DEFAULT).action is Action.ADOPT


@pytest.mark.parametrize(
    "given",
    [
        "",
        "x",
        "errored",
        "errored=",
        "errored=redo",
        "other=skip",
        "errored=skip,errored=skip",
        {"errored": None},
        {1: 2},
        7,
        [],
    ],
)
def test_what_is_no_policy_is_refused(given):
    with pytest.raises(SpecError, match="resume, restart, skip"):
        ResumePolicy.of(given)


def test_bad_policies_are_refused():
    with pytest.raises(SpecError, match="both set"):
        ResumePolicy.from_flags(resume_errored=True, restart_errored=True)
    with pytest.raises(SpecError, match="resume, restart, skip"):
        ResumePolicy(errored="redo")
    assert ResumePolicy(finished="restart").finished is Rerun.RESTART


standings = st.builds(
    lambda status, checkpoint, attempt, claimed, persisted, decided, reported, unusable: standing(
        *(status, checkpoint),
        **{"attempt": attempt, "claimed": claimed, "persisted": persisted, "decided": decided},
        **{"reported": reported, "unusable": unusable},
    ),
    st.sampled_from(TrialStatus),
    st.none() | st.tuples(st.integers(1, 3), st.integers(0, 9)),
    st.integers(1, 3),
    st.booleans(),
    st.none() | st.sampled_from(Outcome),
    st.none() | st.sampled_from(Outcome),
    st.sets(st.integers(0, 12)).map(sorted),
    st.sampled_from(["", "", "", "a file is in the way"]),
)
policies = st.builds(
    lambda unfinished, errored, finished: ResumePolicy(unfinished=unfinished, errored=errored, finished=finished),
    *[st.sampled_from(Rerun)] * 3,
)


@given(standings, policies)
def test_any_plan_keeps_the_rules(found, policy):
    plan = plan_trial(found, policy)
    status = found.trial.status
    assert (plan.trial, plan.status) == (found.trial.number, status)
    assert plan.reason
    assert (plan.step is None) is (plan.parent is None)
    if plan.parent is not None:
        assert plan.action is Action.RESUME
        assert plan.parent == found.checkpoint
    if plan.action is Action.SKIP:
        assert status in UNFINISHED
    if plan.action is Action.ADOPT:
        assert status is TrialStatus.RUNNING or (status is TrialStatus.PENDING and found.decided is not None)
    if plan.action is Action.KEEP:
        assert status in FINISHED | ERRORED
    if status in FINISHED and policy.finished is Rerun.SKIP:
        assert plan.action is Action.KEEP
    again = plan.action in (Action.RESUME, Action.RESTART)
    assert plan.lost == (len([step for step in found.reported if plan.step is None or step > plan.step]) if again else 0)
    if found.unusable:  # nothing runs, and nothing that has ended is touched
        assert plan.action in (Action.SKIP, Action.KEEP, Action.ADOPT)
    if plan.action is Action.RESUME and found.checkpoint is not None:
        assert plan.parent == found.checkpoint
    assert plan_trial(found, policy) == plan
