from pathlib import Path

import pytest

from megatron_cpgd.config.checks import check_config, check_passthrough
from megatron_cpgd.config.load import read_config
from tests.helpers.valid_run import write_model_folder


def problems_of(path: Path, *overrides: str) -> list[str]:
    return check_config(read_config(path, overrides))


def test_a_valid_configuration_has_no_problem(run_yaml):
    assert problems_of(run_yaml) == []


ONE_STEP = "algorithm.mini_batches=1"
NO_CLIP = "algorithm.clip={type: none}"
NO_DRIFT = "algorithm.drift.coef=0"
CLIP = "algorithm.clip={type: constant}"
ONE_RESPONSE = "rollout.samples_per_prompt=1"
TIS = "algorithm.correction={type: truncate}"
OLD_SAMPLER = "algorithm.old_policy=sampler"
R2 = "algorithm.routing_replay=old_policy"
R3 = "algorithm.routing_replay=rollout"
ENGINE = "rollout.engine_args"
SLEEP = "rollout.sleep=true"
MEASURED = "tracking.routing_every=5"
MANY_EPOCHS = "algorithm={mini_batches: 1, epochs: 2}"


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        ([ONE_STEP], "algorithm.clip and algorithm.drift do nothing: with one optimizer step"),
        ([ONE_STEP, NO_DRIFT], "algorithm.clip does nothing: with one optimizer step"),
        ([ONE_STEP, NO_CLIP], "algorithm.drift does nothing: with one optimizer step"),
        (["algorithm.epochs=2", NO_CLIP], "algorithm.epochs=2: passes after the first"),
        (
            ["algorithm.prompt_weight.max_weight=2"],
            "algorithm.prompt_weight.max_weight=2.0 does nothing",
        ),
        (
            [NO_DRIFT, "algorithm.drift.gradient_clip=3"],
            "algorithm.drift.gradient_clip=3.0 does nothing",
        ),
        (
            ["rollout.logprob_diff_limit=0.1", "rollout.top_p=0.9"],
            "rollout.logprob_diff_limit=0.1 compares",
        ),
        (
            ["rollout.logprob_diff_limit=0.1", "rollout.top_k=20"],
            "rollout.logprob_diff_limit=0.1 compares",
        ),
        (
            ["rollout.logprob_diff_limit=0.1", "rollout.staleness=1"],
            "rollout.logprob_diff_limit=0.1 expects trainer and engine to hold the same weights",
        ),
        ([OLD_SAMPLER, TIS], "algorithm.correction compares the trainer's old log-probs with the"),
        ([OLD_SAMPLER, "algorithm.rejection.veto=1e-4"], "algorithm.rejection.veto compares the"),
        (
            [OLD_SAMPLER, "rollout.logprob_diff_limit=0.1"],
            "rollout.logprob_diff_limit compares the trainer's",
        ),
        ([OLD_SAMPLER, "rollout.top_p=0.9"], "algorithm.old_policy=sampler divides by the sampler"),
        (
            ["stability.action=off", "stability.reward_drop=0.3"],
            "stability.reward_drop=0.3 does nothing while stability.action=off",
        ),
        (
            [OLD_SAMPLER, "stability.mismatch=0.5"],
            "stability.mismatch=0.5 does nothing: rollout/kl",
        ),
        (["stability.lr_factor=0.1"], "stability.lr_factor=0.1 does nothing while stability.act"),
        (
            ["rollout.engines=3", "rollout.nodes=2"],
            "rollout.engines=3: expected a multiple of rollout.nodes=2",
        ),
        (
            ["rollout.engines=4", "rollout.nodes=2", "rollout.devices=[0,1,2]"],
            "rollout.devices=[0, 1, 2]: expected a multiple of rollout.engines=4 / rollout.nodes=2",
        ),
        (
            ["rollout.engines=2", "rollout.devices=[0,1,2]"],
            "rollout.devices=[0, 1, 2]: expected a multiple of rollout.engines=2, got 3",
        ),
        (["rollout.nodes=1", "rollout.sleep=true"], "rollout.sleep=true does nothing: with roll"),
        (
            ["rollout.sync=in_place", "rollout.nodes=1"],
            "rollout.sync=in_place reads the memory of the trainer's first node, but rollout.nodes",
        ),
        (
            ["rollout.sync=in_place", "rollout.sleep=true", "optim.offload=true"],
            "rollout.sync=in_place reads weights on the GPUs, from which optim.offload=true takes",
        ),
        (
            ["rollout.sync=in_place", "optim.distributed=false"],
            "rollout.sync=in_place needs the weights in a few buffers, which Megatron has with",
        ),
        (["parallel.vpp=2"], "parallel.vpp=2 needs a pipeline"),
        (["parallel.stage_layers=[6]"], "parallel.stage_layers does nothing: parallel.pp=1"),
        (
            ["parallel.pp=2", "parallel.stage_layers=[3,2,1]"],
            "parallel.stage_layers has 3 numbers, but parallel.pp=2 * vpp=1 = 2 stages",
        ),
        ([SLEEP, "rollout.overlap=true", "rollout.staleness=1"], "rollout.sleep=true lets the"),
        ([SLEEP, "rollout.nodes=1"], "rollout.sleep=true does nothing: with rollout.nodes=1"),
        (
            ["rollout.engines=2", "rollout.devices=[0,1,2,3]", f"{ENGINE}.tensor_parallel_size=4"],
            "rollout.devices=[0, 1, 2, 3]: 2 for each engine, which takes 4 others (rollout.engine",
        ),
        (
            ["rollout.devices=[0,0]", f"{ENGINE}.tensor_parallel_size=2"],
            "rollout.devices=[0, 0]: 2 for each engine, which takes 2 others",
        ),
        (
            [f"{ENGINE}.tensor_parallel_size=two"],
            "rollout.engine_args.tensor_parallel_size: must be an integer > 0, got 'two'",
        ),
        (
            [f"{ENGINE}.kv_cache_memory_bytes=10GB"],
            "rollout.engine_args.kv_cache_memory_bytes: must be an integer > 0, got '10GB'",
        ),
        (
            [f"{ENGINE}.gpu_memory_utilization=90"],
            "rollout.engine_args.gpu_memory_utilization: must be a share of the GPU's memory, > 0 "
            "and <= 1, got 90",
        ),
        (
            [SLEEP, "rollout.devices=[2]", "parallel.dp=2"],
            "rollout.sleep=true does nothing: rollout.devices=[2] are none of the 2 that",
        ),
        (["optim.offload=true"], "optim.offload=true does nothing: with rollout.sleep=false"),
        (
            [SLEEP, "optim.offload=true", "model.megatron.cuda_graph_impl=local"],
            "model.megatron.cuda_graph_impl=local: a captured graph expects the weights where",
        ),
        (["optim.min_lr=1e-7"], "optim.min_lr=1e-07 does nothing"),
        (
            ["optim.schedule=cosine", "optim.min_lr=1e-5"],
            "optim.min_lr=1e-05 must be <= optim.lr=1e-06",
        ),
        (
            ["data.system_prompt=hi", "data.chat_template=false"],
            "data.system_prompt does nothing",
        ),
        (["rollout.prompts_per_step=3"], "algorithm.mini_batches=4 must be <= rollout.prompts_per"),
        ([ONE_RESPONSE], "rollout.samples_per_prompt=1 must be >= 2"),
        (
            [ONE_STEP, NO_DRIFT, NO_CLIP, "algorithm.policy={type: soft_gate}"],
            "algorithm.policy.type=soft_gate does nothing: with one optimizer step",
        ),
        (
            ["algorithm.preset=cispo", CLIP],
            "algorithm.clip does nothing: algorithm.policy",
        ),
        (["algorithm.aggregation.length=7"], "algorithm.aggregation.length=7 does nothing"),
        (["algorithm.reference.estimator=k2"], "algorithm.reference.estimator=k2 does nothing"),
        (["algorithm.reference.path=."], "algorithm.reference.path=. does nothing while"),
        (
            ["algorithm.preset=gspo", "algorithm.clip={type: tight_to_loose}"],
            "algorithm.clip={type: tight_to_loose} has a range for each token",
        ),
        (
            ["algorithm.preset=gspo", "algorithm.clip={type: balanced}"],
            "algorithm.clip={type: balanced} balances the policy term `ratio`, but algorithm.pol",
        ),
        (
            ["algorithm.clip={type: balanced}", "algorithm.epochs=2"],
            "algorithm.clip={type: balanced} balances the policy term `ratio`, but algorithm.pol",
        ),
        (
            ["algorithm.preset=cispo", "algorithm.clip={type: balanced}"],
            "algorithm.clip does nothing: algorithm.policy",
        ),
        (
            ["algorithm.preset=bapo", "algorithm.clip.low_start=0.9"],
            "algorithm.clip.low_start=0.9 and .low_end=0.9 leave no room for one low_step=0.02",
        ),
        (
            ["algorithm.preset=bapo", "algorithm.clip.high_end=1.1"],
            "algorithm.clip.high_start=1.2 and .high_end=1.1 leave no room for one high_step=0.05",
        ),
        (
            ["algorithm.preset=minirl", "algorithm.correction={type: truncate}"],
            "algorithm.correction={type: truncate} counts the difference to the sampler twice",
        ),
        (
            ["algorithm.preset=vespo", "algorithm.policy.anchor=rollout", TIS],
            "algorithm.correction={type: truncate} counts",
        ),
        (["algorithm.preset=minirl", "rollout.top_p=0.9"], "algorithm.policy divides by the samp"),
        ([TIS, "rollout.top_k=20"], "algorithm.correction divides by the sampler's"),
        (["algorithm.rejection.veto=1e-4", "rollout.top_k=20"], "algorithm.rejection divides by"),
        (
            ["algorithm.advantage.overlong_buffer_tokens=5000"],
            "algorithm.advantage.overlong_buffer_tokens=5000 must be <= rollout.max_response",
        ),
        (
            ["algorithm.prompt_weight.type=clip_filter", "rollout.prompts_per_step=1", MANY_EPOCHS],
            "rollout.prompts_per_step=1: algorithm.prompt_weight.type=clip_filter compares",
        ),
        (
            ["algorithm.prompt_weight.type=clip_filter", "algorithm.filter.max_batches=1"],
            "algorithm.prompt_weight.type=clip_filter does nothing: it counts groups of equal",
        ),
        (
            ["algorithm.preset=reinforce_pp", "algorithm.filter.max_batches=2", ONE_RESPONSE],
            "rollout.samples_per_prompt=1 must be >= 2: algorithm.filter.max_batches=2 keeps",
        ),
        (["data.answer_key=null"], "rewards.functions.0: type math needs the ground truth"),
        (
            ["rewards.functions=[{type: format, pattern: '('}]"],
            "rewards.functions.0.pattern: not a regular expression",
        ),
        (
            ["rewards.functions=[{type: python, path: score}]"],
            "rewards.functions.0.path: must be `package.module.function`, got 'score'",
        ),
        (["data.path=nowhere.jsonl"], "data.path=nowhere.jsonl: no such file"),
        (["eval.sets.aime.path=nowhere"], "eval.sets.aime.path=nowhere: no such file"),
    ],
)
def test_a_rule_between_settings_is_named(run_yaml, overrides, start):
    (problem,) = problems_of(run_yaml, *overrides)
    assert problem.startswith(start)


@pytest.mark.parametrize(
    "overrides",
    [
        [ONE_STEP, NO_CLIP, NO_DRIFT],
        [ONE_STEP, "algorithm.epochs=2"],
        ["algorithm.prompt_weight={type: clip_filter, max_weight: 2}"],
        [ONE_STEP, NO_CLIP, NO_DRIFT, "algorithm.policy={type: joint_weight}"],
        ["algorithm.preset=grpo", "algorithm.epochs=2", NO_CLIP],
        ["algorithm.preset=grpo", "algorithm.reference.coef=0"],
        ["algorithm.reference={coef: 0.001, estimator: k2}"],
        ["algorithm.preset=bapo", "algorithm.epochs=2", "algorithm.clip.low_start=0.88"],
        ["algorithm.preset=reinforce_pp", ONE_RESPONSE],
        ["algorithm.preset=gpg", "algorithm.filter={truncated: mask}"],
        ["algorithm.prompt_weight.type=equal", "algorithm.filter.max_batches=1"],
        ["algorithm.preset=dr_grpo", "algorithm.aggregation.length=7"],
        [TIS, "algorithm.rejection={veto: 1e-4, geometric_low: 0.99, geometric_high: 1.01}"],
        ["rollout.logprob_diff_limit=0.1"],
        ["parallel.pp=2", "parallel.vpp=3"],  # 6 layers
        ["parallel.pp=2", "parallel.vpp=2", "parallel.stage_layers=[1,2,2,1]"],
        ["optim.schedule=linear", "optim.min_lr=1e-7"],
        [SLEEP, "optim.offload=true", "rollout.staleness=1"],
        [SLEEP, "rollout.devices=[1]", "parallel.dp=2"],
        ["parallel.sequence_parallel=true"],
        ["stability={action: off, not_finite: 9}"],
        ["stability={action: roll_back, lr_factor: 0.1, max_roll_backs: 5}"],
        ["rollout.prompts_per_step=4"],
        ["data.answer_key=null", "rewards.functions=[{type: format, pattern: 'a.*'}]"],
        ["rewards.functions=[{type: python, path: my.rewards.score}]"],
    ],
)
def test_the_way_out_that_a_message_offers_is_accepted(run_yaml, overrides):
    assert problems_of(run_yaml, *overrides) == []


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        ([R2, OLD_SAMPLER], f"{R2} replays the pass that computes old log-probs"),
        ([R2, ONE_STEP, NO_CLIP, NO_DRIFT], f"{R2} does nothing: with one optimizer step"),
        ([R3, "model.megatron={moe_router_fusion: true}"], "model.megatron.moe_router_fusion=True"),
        ([R2, "model.megatron={cuda_graph_impl: local}"], "model.megatron.cuda_graph_impl=local"),
        ([R2], None),
        ([R2, ONE_STEP, "algorithm.epochs=2"], None),
        ([R3, OLD_SAMPLER], None),
        ([R3, ONE_STEP, NO_CLIP, NO_DRIFT], None),
        ([R3, "model.megatron={cuda_graph_impl: none}"], None),
        (
            [MEASURED, "model.megatron={moe_router_fusion: true}"],
            "model.megatron.moe_router_fusion=True cannot replay or compare routes; remove it or "
            "set tracking.routing_every=null",
        ),
        (
            [R3, MEASURED, "model.megatron={cuda_graph_impl: local}"],
            "model.megatron.cuda_graph_impl=local cannot replay or compare routes; remove it or "
            "set algorithm.routing_replay=none and tracking.routing_every=null",
        ),
        ([MEASURED], None),
        ([MEASURED, OLD_SAMPLER], None),
        ([MEASURED, "run.steps=4"], "tracking.routing_every=5 does nothing: the first measurement"),
        (["model.megatron={moe_router_fusion: true}"], None),
    ],
)
def test_what_cannot_replay_routes_is_named(run_yaml, overrides, start):
    experts = {"num_experts": 8, "moe_intermediate_size": 32}
    folder = write_model_folder(run_yaml.parent / "experts", **experts)
    problems = problems_of(run_yaml, f"model.path={folder}", *overrides)
    assert [problem.startswith(start) for problem in problems] == [True] * (start is not None)


@pytest.mark.parametrize("setting", ["router.aux_loss_coef=0.001", "router.z_loss_coef=0.001"])
def test_routers_are_not_balanced_inside_captured_layers(run_yaml, setting):
    folder = write_model_folder(run_yaml.parent / "experts", num_experts=8)
    graph = "model.megatron={cuda_graph_impl: local}"
    assert problems_of(run_yaml, f"model.path={folder}", graph) == []
    (problem,) = problems_of(run_yaml, f"model.path={folder}", graph, setting)
    assert problem.startswith("model.megatron.cuda_graph_impl=local repeats a captured pass")


def test_a_data_file_of_another_kind_is_refused(run_yaml):
    csv = run_yaml.parent / "train.csv"
    csv.touch()
    (problem,) = problems_of(run_yaml, f"data.path={csv}")
    assert "must be a .jsonl or .parquet file" in problem


def test_a_run_dir_that_is_a_file_is_refused(run_yaml):
    (problem,) = problems_of(run_yaml, f"run.dir={run_yaml}")
    assert "must be a folder, but is a file" in problem


def test_the_number_of_processes_is_the_product_of_the_axes(run_yaml, monkeypatch):
    overrides = ("parallel.tp=2", "parallel.pp=3", "parallel.cp=2", "parallel.dp=4")
    monkeypatch.setenv("WORLD_SIZE", "48")
    assert problems_of(run_yaml, *overrides) == []
    monkeypatch.setenv("WORLD_SIZE", "8")
    (problem,) = problems_of(run_yaml, *overrides)
    assert "parallel.tp=2 * pp=3 * cp=2 * dp=4 = 48, but WORLD_SIZE=8" in problem


def test_options_of_other_libraries_are_checked_by_name():
    given = {"layernorm_epsilon": 1, "layernorm_epsilonn": 2, "num_layers": 3}
    assert check_passthrough(
        given,
        allowed={"layernorm_epsilon", "num_layers", "hidden_size"},
        forbidden={"num_layers": "model.path"},
        where="model.megatron",
    ) == [
        "model.megatron.layernorm_epsilonn: unknown option; did you mean 'layernorm_epsilon'?",
        "model.megatron.num_layers: is set by us; use model.path instead",
    ]


def test_a_forbidden_option_is_never_suggested():
    (problem,) = check_passthrough(
        {"num_layer": 1}, allowed={"num_layers", "x"}, forbidden={"num_layers": "-"}, where="w"
    )
    assert problem == "w.num_layer: unknown option; known here: x"


def test_with_the_samplers_old_policy_one_optimizer_step_already_clips(run_yaml):
    assert problems_of(run_yaml, ONE_STEP, OLD_SAMPLER) == []


def test_experts_are_spread_over_the_ranks_of_a_pipeline_stage(run_yaml):
    sizes = ["parallel.tp=2", "parallel.dp=3", "parallel.ep=4"]
    rule, _no_experts = problems_of(run_yaml, *sizes)
    assert rule.startswith("parallel.ep=4 * etp=1 must divide tp=2 * cp=1 * dp=3 = 6: ")
    assert len(problems_of(run_yaml, *sizes[:2], "parallel.ep=3", "parallel.etp=2")) == 2
