"""How the rehearsal runs each command of the pages: what it appends, and on how many devices and processes."""

from rehearsal import Rule

SMALL = (
    "--config.model.height=64 --config.model.width=64 --config.rollout.prompts=2 --config.rollout.group_size=2"
    " --config.rollout.steps=5 --config.rollout.micro_batch=4 --config.optimizer.micro_batch=4"
    " --config.evaluation.steps=5 --config.evaluation.final_prompts=2 --config.evaluation.images_per_prompt=1"
    " --config.evaluation.batch=4 --config.evaluation.picture_prompts=2"
)
"""Sizes for a published recipe."""
ONCE, TWICE = f"{SMALL} --config.iterations=1", f"{SMALL} --config.iterations=2"
PICTURES, SIZE = "--steps 4", "--height 64 --width 64"
UNCHECKED = "--config.rewards.scorers.{}.check_example=False"
"""Random weights fail the scorer's built-in self-test, which would stop the run."""
DETECTOR = f"--config.rewards.scorers.geneval.options.any_size=true {UNCHECKED.format('geneval')}"
PICK = UNCHECKED.format("pickscore")
READER = "--config.rewards.scorers.ocr.replicas=1"
TRAINED = 'cp -r "$STANDINS/checkpoint-100" .'
"""A training checkpoint of the public release."""
LAUNCHES = Rule(r"(^|\s)(scripts/launch_|sbatch )", how="elsewhere", test="tests/scripts/test_launch.py")
SHAPES = (
    "--config.iterations={} --config.optimizer.schedule=constant --config.optimizer.warmup_updates=1"
    " --config.rollout.prompts=4 --config.rollout.group_size=4 --config.rollout.micro_batch=8"
    " --config.optimizer.micro_batch=16 --config.evaluation.final_prompts=6"
    " --config.evaluation.images_per_prompt=1 --config.evaluation.batch=8 --config.evaluation.picture_prompts=4"
)
"""Sizes for the worlds of shapes and signs: those of the smoke run, whose programs other tests have compiled."""
CIRCLE = """python -c "from PIL import Image, ImageDraw
image = Image.new('RGB', (224, 224), (228, 228, 228))
ImageDraw.Draw(image).ellipse((50, 50, 170, 170), (214, 40, 44))
image.save('picture.png')"
"""

DOWNLOADS = (
    Rule(r"^(pip|hf|curl|wget) [^&]*$"),
    Rule(r"^python -m rewards_bridge\.scorers\.ocr_models "),
    Rule(r"prepare_prompts generate-geneval", "--count 60"),
    Rule(r"^python -m scripts\.prepare_prompts (geneval|ocr|prompts) "),
)
LOOKING = (Rule(r"^python -m rewards_bridge doctor", statuses=(0, 1)),)
"""Status 1: random weights fail the scorer's built-in self-test."""
COMPILATION = "--config.model.height=64 --config.model.width=64 --no-search --programs "
"""One program at the sizes of the stand-ins: the one that needs most memory, or the one that compiles fastest."""

PRETRAINING = "tests/{}.py::test_the_base_is_made_in_small_and_goes_on"
COMPILER = "tests/compile_check/test_compile_only.py::test_the_compiler_that_is_named_is_the_one_that_is_pinned"
INLINE = {
    r"^pytest tests/scripts/test_prepare_prompts": "tests/scripts/test_prepare_prompts.py",
    r"^python -m udm_grpo\.convert to-pytorch$": "tests/commands/test_convert.py",
    r"^pip install libtpu==": COMPILER,
    r"^python -m scripts\.compile_table ": "tests/scripts/test_compile_table.py",
    r"^apt-get install chromium": ".ci/run",
    r"^pip install gcsfs$": "tests/files/test_buckets.py",
    r"^pip install -e ": "tests/project/test_install.py",
    r"^pip wheel \.$": "tests/project/test_install.py",
    r"^pip install torch==\S+ --index-url ": "tests/project/test_install.py",
    r"^pip install .?jax\[cuda13\]": "tests/model/test_cuda_compiler.py",
    r"^python -m scripts\.torture$": "tests/scripts/test_torture.py",
    r"^python -m udm_grpo\.doctor$": "tests/lifecycle/test_run_needs.py",
}
"""Commands in running text that are not part of a page's command -> what runs or checks them."""

RULES: dict[str, tuple[Rule, ...]] = {
    "README": (
        *DOWNLOADS,
        LAUNCHES,
        Rule(
            r"^python -m scripts\.pretrain_shapes ",
            how="elsewhere",
            test=PRETRAINING.format("project/test_readme"),
        ),
        Rule(r"^python -m scripts\.pretrain_signs ", how="elsewhere", test=PRETRAINING.format("worlds/test_signs")),
        Rule(r"python -m pytest$", "-n 0 -p no:cacheprovider tests/model/test_chunks.py"),
        Rule(r"JAX_NUM_PROCESSES=2", f"{SHAPES.format(1)} --config.output_dir=outputs/together", processes=2),
        Rule(r"shapes_ocr\.py", SHAPES.format(1)),
        Rule(r"configs/shapes\.py --config\.checkpoint\.resume=latest", SHAPES.format(2)),
        Rule(r"configs/shapes\.py:smoke", "--config.iterations=2"),
        Rule(r"configs/shapes\.py", SHAPES.format(1)),
        Rule(r"udm_grpo\.report outputs/shapes outputs/other", before="cp -r outputs/shapes-smoke outputs/other"),
        Rule(r"^python -m udm_grpo\.report "),
        Rule(r"^python -m udm_grpo\.(sample|evaluate|convert) "),
        Rule(r"^python -m scripts\.demo ", "--port 0", how="serve"),
        Rule(r"^python -m scripts\.ablation ", how="elsewhere", test="tests/scripts/test_ablation.py"),
        Rule(r"^python -m scripts\.benchmark ", "--minutes 0.2 --stages sampler"),
        Rule(r"^python -m rewards_bridge serve ", how="serve"),
        Rule(r"^python -m rewards_bridge score ", before=CIRCLE),
        *LOOKING,
    ),
    "geneval": (
        Rule(r"--leave-out evaluation_metadata", "--count 60", before="cp downloads/evaluation_metadata.jsonl ."),
        *DOWNLOADS,
        LAUNCHES,
        *LOOKING,
        Rule("--compile-only", f"{COMPILATION}update"),
        Rule(r"checkpoint\.resume=latest", f"{TWICE} {DETECTOR}"),
        Rule(r"sample .*--transformer ", f"{PICTURES} --images-per-prompt 1 {SIZE}", before=TRAINED),
        Rule(r"^python -m udm_grpo\.convert rewrite ", before=TRAINED),
        Rule(r"options\.clip=", f"{ONCE} {DETECTOR} --config.output_dir=outputs/geneval-open-clip"),
        Rule(r"^python -m udm_grpo\.train ", f"{ONCE} {DETECTOR}", devices=8),
        Rule(r"^python -m udm_grpo\.sample --checkpoint", f"{PICTURES} --images-per-prompt 1 {SIZE}"),
        Rule(r"^python -m udm_grpo\.sample ", f"{PICTURES} --images-per-prompt 1"),
        Rule(r"^python -m udm_grpo\.evaluate ", DETECTOR),
    ),
    "pickscore": (
        *DOWNLOADS,
        LAUNCHES,
        *LOOKING,
        Rule("--compile-only", f"{COMPILATION}decode"),
        Rule(r"checkpoint\.resume=latest", f"{TWICE} {PICK} {{remote}}", devices=7, optimised=True),
        Rule(r"^python -m udm_grpo\.train ", f"{ONCE} {PICK} {{remote}}", devices=7, optimised=True),
        Rule(r"^python -m udm_grpo\.sample --checkpoint", f"{PICTURES} {SIZE}"),
        Rule(r"^python -m udm_grpo\.sample ", PICTURES),
        Rule(r"^python -m udm_grpo\.evaluate ", PICK),
    ),
    "ocr": (
        Rule(r"--train ocr/train\.txt", before="cp -r downloads/ocr ocr"),
        *DOWNLOADS,
        LAUNCHES,
        *LOOKING,
        Rule("--compile-only", f"{COMPILATION}decode"),
        Rule(r"checkpoint\.resume=latest", f"{TWICE} {READER}"),
        Rule(r"^python -m udm_grpo\.train ", f"{ONCE} {READER}", processes=2),
        Rule(r"^python -m udm_grpo\.sample --checkpoint", f"{PICTURES} {SIZE}"),
        Rule(r"^python -m udm_grpo\.sample ", PICTURES),
        Rule(r"^python -m udm_grpo\.evaluate ", READER),
    ),
}
