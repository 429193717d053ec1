"""Spot the bug: the known mistakes of the field, each as an exercise and as a check of the tests.

    python tests/planted_faults.py --puzzle 7             a copy of the project with fault 7
    python tests/planted_faults.py --puzzle 7 --to FOLDER
    python tests/planted_faults.py --answer 7             where it is, and which test sees it
    python tests/planted_faults.py                        would the tests notice? all faults
    python tests/planted_faults.py temperature norm       those whose name contains a word

**The exercise.** A puzzle says what you would observe: the loss dives, a rank falls, the table
flatters. Find the line. Nearly all of these faults raise no error, and many of them have been
found in published code. The tests of the copy would tell you where to look, so try without.
Figures in a puzzle come from small trainings (drawn shapes or film reviews, 60 to 500 steps).

**The check.** Each fault is planted in a copy of the code, and the test that should see it is
run. Printed: "caught" or "SURVIVED" for each, and the score. The exit code is 1 if one survived.

**How a fault is written.** An Edit names a file, a function, the right code and the wrong code.
The right code is found by its syntax tree. So line breaks, comments, quotes and brackets do not
matter, and variables may have other names: the wrong code then gets the same names. The faults
themselves are at the end of this file, so you can read about the check without being told.
"""

import argparse
import ast
import difflib
import shutil
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Edit:
    """One place in the code, and what to put there."""
    file: str               # from the root of the project
    function: str           # such as "info_nce", "BYOL.forward", or "main.make_view"
    right: str              # one expression or one statement of this function
    wrong: str              # any code that can stand in its place


@dataclass
class Fault:
    """A mistake that a programmer could make, and the test that should see it."""
    name: str
    symptom: str            # what one observes
    reason: str             # why it is wrong, and where it has been found
    test: str               # FILE::TEST, in the folder tests
    edits: list


# ---------------------------------------------------------------- changing the code

def find_function(tree, name):
    """The syntax tree of a function; name as in Edit. Raises LookupError if there is none."""
    node = tree
    for part in name.split("."):
        for child in ast.walk(node):
            is_named = isinstance(child, (ast.FunctionDef, ast.ClassDef))
            if is_named and child.name == part:
                node = child
                break
        else:
            raise LookupError(f"there is no {name}")
    return node


def parse(code):
    """The syntax tree of one expression or one statement."""
    statement = ast.parse(textwrap.dedent(code)).body[0]
    if isinstance(statement, ast.Expr):
        return statement.value
    return statement


def is_same(pattern, node, names):
    """Whether two syntax trees are the same, apart from the names of variables.

    names: a dict that receives the names of the pattern and those that stand for them.
    """
    if type(pattern) is not type(node):
        return False
    if isinstance(pattern, ast.Name):
        return names.setdefault(pattern.id, node.id) == node.id
    if isinstance(pattern, ast.AST):
        for field in pattern._fields:
            if not is_same(getattr(pattern, field), getattr(node, field), names):
                return False
        return True
    if isinstance(pattern, list):
        pairs = zip(pattern, node)
        return len(pattern) == len(node) and all(is_same(a, b, names) for a, b in pairs)
    return pattern == node


def find_places(source, edit):
    """Where the right code of an Edit stands: a list of (node, names).

    If the code stands there with its own names, other places do not count.
    Raises LookupError if the source has no such function.
    """
    pattern = parse(edit.right)
    exact, renamed = [], []
    for node in ast.walk(find_function(ast.parse(source), edit.function)):
        names = {}
        if not is_same(pattern, node, names):
            continue
        if all(old == new for old, new in names.items()):
            exact.append((node, names))
        elif len(set(names.values())) == len(names):
            renamed.append((node, names))
    return exact or renamed


def rename(code, names):
    """The code with other names of variables."""
    if all(old == new for old, new in names.items()):
        return textwrap.dedent(code).strip()
    tree = ast.parse(textwrap.dedent(code))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            node.id = names.get(node.id, node.id)
    return ast.unparse(tree)


def change(source, edit):
    """The source with the wrong code in place of the right code. All else stays as it is.

    Raises LookupError unless the right code stands once in the function.
    """
    places = find_places(source, edit)
    if len(places) != 1:
        raise LookupError(
            f"{edit.file}, {edit.function}: found {len(places)} places like\n"
            f"    {edit.right}\n"
            f"and expected one; write the present code into this Edit"
        )
    node, names = places[0]
    wrong = rename(edit.wrong, names)
    wrong = wrong.replace("\n", "\n" + " " * node.col_offset)
    # The positions of a syntax tree count bytes, and the comments have other letters.
    lines = source.encode().splitlines(keepends=True)
    before = b"".join(lines[:node.lineno - 1]) + lines[node.lineno - 1][:node.col_offset]
    after = lines[node.end_lineno - 1][node.end_col_offset:]
    after += b"".join(lines[node.end_lineno:])
    return (before + wrong.encode() + after).decode()


def copy_project(folder):
    """Copy the project to a folder, without what is not code. Returns the folder, a Path."""
    def left_out(of, names):
        unwanted = [name for name in names if name.startswith(".") or name == "__pycache__"]
        if Path(of) == ROOT:
            unwanted += ["data", "runs"]
        return unwanted

    return Path(shutil.copytree(ROOT, folder, ignore=left_out, dirs_exist_ok=True))


def apply(folder, edits):
    """Make the edits in a copy of the project."""
    for edit in edits:
        path = folder / edit.file
        source = path.read_text(encoding="utf-8")
        path.write_text(change(source, edit), encoding="utf-8")


# ---------------------------------------------------------------- the exercise

def wrap(text):
    """The text as one paragraph."""
    return textwrap.fill(" ".join(text.split()), 96, break_on_hyphens=False)


def make_puzzle(number, folder):
    """Copy the project with one fault to a folder, and say what one observes."""
    fault = FAULTS[number - 1]
    folder = Path(folder or tempfile.mkdtemp(prefix=f"minissl-puzzle-{number}-"))
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"--to {folder}: this folder is not empty; give a new name")
    copy_project(folder)
    apply(folder, fault.edits)
    print(f"Puzzle {number} of {len(FAULTS)} is in {folder}\n")
    print(wrap(fault.symptom))
    print(f"\nWhich line is it? python tests/planted_faults.py --answer {number}")


def show_answer(number):
    """Print the place of a fault, the right and the wrong lines, and the test that sees it."""
    fault = FAULTS[number - 1]
    print(f"{number}. {fault.name}\n")
    for edit in fault.edits:
        print(f"{edit.file}, {edit.function}: - is right, + is wrong")
        source = (ROOT / edit.file).read_text(encoding="utf-8")
        right, wrong = source.splitlines(), change(source, edit).splitlines()
        lines = list(difflib.unified_diff(right, wrong, lineterm="", n=3))
        print("\n".join(lines[2:]) + "\n")
    print(wrap(fault.reason))
    print(f"\nThe test that sees it: tests/{fault.test}")


# ---------------------------------------------------------------- the check

def run_tests(folder, tests):
    """Run tests of a copy of the project. Returns pytest's exit code and what it printed."""
    names = [f"tests/{test}" for test in tests]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *names]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace"
    )
    return done.returncode, done.stdout + done.stderr


def check(faults):
    """Plant each fault in turn and run its test. Returns the exit code."""
    survived = []
    with tempfile.TemporaryDirectory() as folder:
        clean = copy_project(Path(folder) / "clean")
        tests = sorted({fault.test for fault in faults})
        code, printed = run_tests(clean, tests)
        if code != 0:
            print(f"{printed}\nThese tests must pass without a fault, so nothing was checked.")
            return 1
        for fault in faults:
            copy = copy_project(Path(folder) / "copy")
            apply(copy, fault.edits)
            code, printed = run_tests(copy, [fault.test])
            shutil.rmtree(copy)
            # Code 1 means that a test failed; other codes mean that none ran.
            is_caught = code == 1 and "failed" in printed
            if not is_caught:
                survived.append(fault.name)
            number = FAULTS.index(fault) + 1
            result = "caught  " if is_caught else "SURVIVED"
            print(f"{number:3} {result} {fault.name} ({fault.test})", flush=True)
    print(f"{len(faults) - len(survived)} of {len(faults)} faults were caught")
    return 1 if survived else 0


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="check only these faults")
    parser.add_argument("--puzzle", type=int, metavar="N", help="make a copy with fault N")
    parser.add_argument("--to", metavar="FOLDER", help="where to; default: a temporary folder")
    parser.add_argument("--answer", type=int, metavar="N", help="show where fault N is")
    options = parser.parse_args()
    for name in ("puzzle", "answer"):
        number = getattr(options, name)
        if number is not None and not 1 <= number <= len(FAULTS):
            parser.error(f"--{name} {number}: must be from 1 to {len(FAULTS)}")
    if options.puzzle:
        return make_puzzle(options.puzzle, options.to)
    if options.answer:
        return show_answer(options.answer)
    chosen = []
    for fault in FAULTS:
        if not options.words or any(word in fault.name for word in options.words):
            chosen.append(fault)
    if not chosen:
        parser.error(f"no fault has a name with {' or '.join(options.words)} in it")
    return check(chosen)


# ---------------------------------------------------------------- the faults: spoilers

TRANSFORMER = "minissl/transformer.py"
CONTRASTIVE = "minissl/contrastive.py"
AUTOENCODER = "minissl/autoencoder.py"
OPTIM = "minissl/optim.py"
SPLITS = "minissl/data/splits.py"
DISTRIBUTED = "minissl/training/distributed.py"
RUN = "minissl/training/run.py"
PROBES = "minissl/evaluation/probes.py"
IMAGE_TABLE = "minissl/evaluation/image_table.py"

FAULTS = [
    # ------------------------------------------------------------ masked words

    Fault(
        name="the masked tokens stay in the input",
        symptom="""
            train_mlm.py --document-weight 0 on film reviews: within 500 steps the masked loss
            and the held-out loss drop to 0, and the accuracy rises to 100 %. With 10 labels a
            class the features are three points worse than usual.""",
        reason="""
            The target has leaked into the input, so the model learns to copy. Much textbook code
            computes targets for 15 % of the tokens and feeds the original sequence. Measured:
            EXPERIMENTS.md, "What stands where a token was masked?".""",
        test="test_transformer.py::test_copying_solves_the_textbook_trap_but_not_our_task",
        edits=[Edit(
            TRANSFORMER, "mask_tokens",
            right="inputs[chosen] = hidden",
            wrong="inputs[chosen] = original",
        )],
    ),
    Fault(
        name="the loss covers the tokens that are not masked",
        symptom="""
            train_mlm.py: after 150 steps of the second stage the masked loss is below 2 instead
            of above 6, and the accuracy is above 80 %. But --fill answers no better than before,
            and a step takes longer.""",
        reason="""
            85 % of these answers are in the input, so the mean is nearly that of copying. Found
            in mlm-pytorch (pull request 3). A similar waste without the wrong loss is the output
            layer at every position (transformers, issue 2926).""",
        test="test_transformer.py::test_targets_are_the_original_tokens_or_minus_100",
        edits=[Edit(
            TRANSFORMER, "mask_tokens",
            right="targets = tokens.masked_fill(~chosen, IGNORE_INDEX)",
            wrong="targets = tokens.masked_fill(~is_real(lengths, T), IGNORE_INDEX)",
        )],
    ),
    Fault(
        name="nothing is masked in a short text",
        symptom="""
            train_mlm.py on a file of titles, two or three tokens each: the preview at the end of
            the first stage stops with a division by zero. On longer texts nobody notices
            anything.""",
        reason="""
            15 % of three tokens, rounded, is 0, and the mean over no token is 0/0. Found in
            transformers (issue 16711).""",
        test="test_transformer.py::test_exactly_the_share_of_each_sequence_is_masked",
        edits=[Edit(
            TRANSFORMER, "mask_tokens",
            right="(share * lengths + 0.5).floor().clamp(min=1)",
            wrong="(share * lengths + 0.5).floor()",
        )],
    ),
    Fault(
        name="every step hides the same places",
        symptom="""
            train_mlm.py: nothing looks wrong. The masks of two steps whose batches have equal
            shapes are the same, position by position.""",
        reason="""
            The draw does not depend on the step. Masks should be new each time that a sequence
            is seen (Liu et al. 2019, "RoBERTa", section 4.1). No loss shows this, so a test
            counts how often each random generator is used.""",
        test="test_train_mlm.py::test_no_draw_of_a_run_is_used_twice",
        edits=[Edit(
            "train_mlm.py", "main.masked_window_batch",
            right='generator(settings.seed, "mask", step)',
            wrong='generator(settings.seed, "mask", 0)',
        )],
    ),
    Fault(
        name="padding is attended to",
        symptom="""
            The features of a text depend on the batch: alone it gets other features than beside
            a longer text.""",
        reason="""
            Without a mask, softmax gives weight to the keys of [PAD]. The more padding a batch
            has, the less weight is left for the words.""",
        test="test_transformer.py::test_padding_changes_nothing_whatever_it_holds",
        edits=[Edit(
            TRANSFORMER, "TextEncoder.forward",
            right="visible = is_real(lengths, T)[:, None, None]",
            wrong="visible = None",
        )],
    ),
    Fault(
        name="positions are counted in bfloat16",
        symptom="""
            With --precision bfloat16 and --window 512, the blocks cannot tell the order of two
            neighbouring words behind position 256. In float32 they can.""",
        reason="""
            bfloat16 has eight binary digits, so above 256 it cannot tell an odd number from the
            even one beside it. Angles need float32 until their sine and cosine are taken.""",
        test="test_transformer.py::test_bfloat16_knows_distant_positions_apart",
        edits=[Edit(
            TRANSFORMER, "rotate",
            right="exact = accurate_dtype(x)",
            wrong="exact = x.dtype",
        )],
    ),

    # ------------------------------------------------------------ the rest of the document

    Fault(
        name="the first stage predicts the words that it has read",
        symptom="""
            train_mlm.py: the document loss of the first stage is lower than usual (7.5 instead
            of 7.7 after 100 steps on film reviews). When the second stage begins, this lead is
            gone.""",
        reason="""
            The words to predict are those of the input, so the model is rewarded for copying.
            They must be the words of the other part.""",
        test="test_train_mlm.py::test_gradient_of_the_first_stage_one_document_at_a_time",
        edits=[Edit(
            "train_mlm.py", "document_loss_of_whole_texts",
            right="bag = model.bag_of_terms(rest)",
            wrong="bag = model.bag_of_terms(read)",
        )],
    ),

    # ------------------------------------------------------------ InfoNCE

    Fault(
        name="the temperature is missing from one term",
        symptom="""
            train_contrastive.py: at step 1 the loss is three nats above its chance level. It
            falls, but the nearest neighbours are worse than usual. With --temperature 1 all is
            well.""",
        reason="""
            The sum has s / τ, and the positive pair has s. Only with τ = 1 are they the logits
            of one softmax. Found in info-nce-pytorch (pull request 17).""",
        test="test_contrastive.py::test_info_nce_equals_loops_by_value_and_gradient",
        edits=[Edit(
            CONTRASTIVE, "info_nce",
            right="(log_total - same_image)[is_positive].mean()",
            wrong="(log_total - same_image * temperature)[is_positive].mean()",
        )],
    ),
    Fault(
        name="a view's similarity with itself is left in the sum",
        symptom="""
            train_contrastive.py --views 2: the loss is 0.3 higher than usual and never falls
            below ln 2, however well the encoder tells images apart. The probe loses a point.""",
        reason="""
            Each view is its own nearest candidate, with cosine 1, and it can never be pushed
            away. So no positive gets more than half of the probability. Found in lightning-bolts
            (issue 695). Measured: EXPERIMENTS.md, "What does it cost to leave a view's
            similarity with itself in the sum?".""",
        test="test_contrastive.py::test_info_nce_equals_loops_by_value_and_gradient",
        edits=[Edit(
            CONTRASTIVE, "info_nce",
            right='s.masked_fill(itself, float("-inf")).logsumexp(1)',
            wrong="s.logsumexp(1)",
        )],
    ),
    Fault(
        name="a view's similarity with itself keeps its gradient",
        symptom="""
            On a few small vectors info_nce gives the right loss to the last digit, and with the
            cosine nothing is wrong. train_contrastive.py --similarity dot stops at step 1,
            because the loss is not finite.""",
        reason="""
            exp(s_ii) is subtracted as a constant, but the sum that it is subtracted from
            contains it as a variable. So with the dot product the gradient is wrong. And
            exp(s_ii) overflows, where logsumexp does not. With the cosine s_ii never changes and
            is at most 1 / τ, so neither is seen. Found in lightning-bolts (issue 695).""",
        test="test_contrastive.py::test_self_similarity_is_in_no_value_and_no_gradient",
        edits=[Edit(
            CONTRASTIVE, "info_nce",
            right='s.masked_fill(itself, float("-inf")).logsumexp(1)',
            wrong="(s.exp().sum(1) - s.detach().diagonal().exp()).log()",
        )],
    ),
    Fault(
        name="the logarithm of a mean stands for the mean of logarithms",
        symptom="""
            train_contrastive.py: at step 1 the loss is half a nat below its chance level, although
            the encoder knows nothing yet. A few badly matched images hardly change it.""",
        reason="""
            −log(mean p) is at most mean(−log p), and its gradient favours the pairs that are
            already matched well. Found in relational-reasoning (issue 3). For several positives,
            Khosla et al. 2020 compare both (equations 2 and 3).""",
        test="test_contrastive.py::test_info_nce_equals_loops_by_value_and_gradient",
        edits=[Edit(
            CONTRASTIVE, "info_nce",
            right="(log_total - same_image)[is_positive].mean()",
            wrong="-(same_image - log_total)[is_positive].exp().mean().log()",
        )],
    ),
    Fault(
        name="both views of an image are the same",
        symptom="""
            train_contrastive.py: the loss starts far below its chance level and dives. The
            alignment in the log is 0, and the nearest neighbours are much worse than usual.""",
        reason="""
            Both views are drawn with the same random numbers. A picture is trivially similar to
            itself, so the encoder never learns what to ignore.""",
        test="test_train_images.py::test_the_step_of_simclr_is_its_formula",
        edits=[Edit(
            "train_contrastive.py", "main.random_numbers",
            right="torch.rand(count, V, 11, generator=rng)",
            wrong="torch.rand(count, 1, 11, generator=rng).expand(count, V, 11)",
        )],
    ),
    Fault(
        name="the whole batch has one augmentation draw",
        symptom="""
            train_contrastive.py: the loss stays higher than usual, and the nearest neighbours
            are worse. On views.png all images of a row are cropped at the same place.""",
        reason="""
            There is one crop and one change of colours for the whole batch. So a step compares
            only one pair of distortions, and the steps differ more than they should. Found in
            byol-pytorch, whose augmentation got a batch and drew once.""",
        test="test_train_images.py::test_the_step_of_simclr_is_its_formula",
        edits=[Edit(
            "train_contrastive.py", "main.random_numbers",
            right="torch.rand(count, V, 11, generator=rng)",
            wrong="torch.rand(1, V, 11, generator=rng).expand(count, V, 11)",
        )],
    ),

    # ------------------------------------------------------------ BYOL

    Fault(
        name="BYOL learns from its own view",
        symptom="""
            train_contrastive.py --method byol: the loss dives to nearly 0. The alignment gets
            worse instead of better: two views of an image are far from each other.""",
        reason="""
            From each view the target of the same view is predicted. So nothing asks the encoder
            to see two views of an image alike.""",
        test="test_contrastive.py::test_byol_loss_is_the_distance_of_unit_vectors",
        edits=[Edit(
            CONTRASTIVE, "byol_loss",
            right="~torch.eye(V, dtype=torch.bool, device=q.device)",
            wrong="torch.eye(V, dtype=torch.bool, device=q.device)",
        )],
    ),
    Fault(
        name="BYOL's target is the encoder, and it has a gradient",
        symptom="""
            train_contrastive.py --method byol: the loss falls to a tenth of its usual value, and
            the effective rank of the projections falls to about 2.""",
        reason="""
            Both sides of the distance move towards each other, and the shortest way to distance
            0 is one answer for all images. Measured: EXPERIMENTS.md, "What keeps BYOL from
            collapsing?".""",
        test="test_contrastive.py::test_byol_loss_gives_the_target_no_gradient",
        edits=[
            Edit(
                CONTRASTIVE, "byol_loss",
                right="targets.detach()",
                wrong="targets",
            ),
            Edit(
                CONTRASTIVE, "BYOL.forward",
                right="self.project_by_target(views)",
                wrong="self.project(views)",
            ),
        ],
    ),

    # ------------------------------------------------------------ the autoencoder

    Fault(
        name="the corrupted image is to be rebuilt",
        symptom="""
            train_ae.py --masked 0.6: the squared error is a third of the usual one, but the
            held-out error is more than twice as large. On reconstructions.png the third row
            shows the grey squares of the second.""",
        reason="""
            The loss compares with what the encoder was given. A denoising autoencoder has to
            rebuild the clean image (Vincent et al. 2008).""",
        test="test_train_images.py::test_the_step_of_the_autoencoder_is_its_formula",
        edits=[Edit(
            "train_ae.py", "compute_loss",
            right="""
                autoencoder.autoencoder_loss(
                    images, rebuilt, codes, settings.beta, settings.regularizer, hidden
                )""",
            wrong="""
                autoencoder.autoencoder_loss(
                    corrupted, rebuilt, codes, settings.beta, settings.regularizer, hidden
                )""",
        )],
    ),
    Fault(
        name="the variances count as correlations",
        symptom="""
            train_ae.py --regularizer decorrelated --beta 0.1: R(z) is higher by 1 than usual,
            and never falls below 1. The correlation in the log falls as it should.""",
        reason="""
            The diagonal of the covariance holds the variances. The batch norm of the code keeps
            each at 1, so the D squares divided by D are 1.""",
        test="test_autoencoder.py::test_the_loss_equals_loops_by_value_and_gradient",
        edits=[Edit(
            AUTOENCODER, "covariance_penalty",
            right="(everything - variances) / D",
            wrong="everything / D",
        )],
    ),

    # ------------------------------------------------------------ training

    Fault(
        name="the gradients are never cleared",
        symptom="""
            Every script: the first step is right. Then the loss falls much more slowly than
            usual, and the nearest neighbours are worse.""",
        reason="""
            PyTorch adds each gradient to the one before. So a step follows the sum of all
            gradients since the beginning.""",
        test="test_optim.py::test_after_a_step_no_gradient_is_left",
        edits=[Edit(
            OPTIM, "step_optimizers",
            right="optimizer.zero_grad()",
            wrong="pass",
        )],
    ),
    Fault(
        name="a resumed run forgets its momentum",
        symptom="""
            A run that was stopped and resumed ends with other weights than one that was never
            stopped.""",
        reason="""
            The weights and the step come back, the state of the optimizers does not: momentum
            begins again at 0, and Adam's variances too.""",
        test="test_run.py::test_a_stopped_run_ends_like_an_undisturbed_one",
        edits=[Edit(
            RUN, "Run._load",
            right="optimizer.load_state_dict(state)",
            wrong="optimizer.state_dict()",
        )],
    ),

    # ------------------------------------------------------------ several processes

    Fault(
        name="a gather returns 1/N of the gradient",
        symptom="""
            torchrun with two processes: the loss of step 1 equals that of one process to the
            last digit. The losses of the later steps do not.""",
        reason="""
            The value of the sum is right. But each process's embeddings are also in the other
            processes' losses, and the gradients from there are lost. Found in barlowtwins
            (main.py, line 216) and in Spijkervet's SimCLR (issue 30).""",
        test="test_distributed.py::test_loss_and_gradients_of_n_processes_are_those_of_one",
        edits=[Edit(
            DISTRIBUTED, "_Sum.backward",
            right="_Sum.apply(gradient)",
            wrong="gradient",
        )],
    ),
    Fault(
        name="the views of two processes are joined as more views",
        symptom="""
            torchrun with two processes: no error is raised, but after 60 steps the loss has
            hardly fallen below its chance level. With one process it is a nat below.""",
        reason="""
            Twice as many views of half of the images. InfoNCE then takes different images for
            positives; see the drawing in all_gather.""",
        test="test_distributed.py::test_a_script_learns_the_same_in_two_processes",
        edits=[Edit(
            "train_contrastive.py", "simclr_loss",
            right="all_gather(model(views), dim=1)",
            wrong="all_gather(model(views), dim=0)",
        )],
    ),
    Fault(
        name="the mean of the processes' means",
        symptom="""
            torchrun train_mlm.py with two processes: the weights differ from those of one
            process, and more so if the texts have very different lengths. With one process
            nothing is wrong.""",
        reason="""
            Each process divides by the number of its own masked tokens, then the quotients are
            averaged. A token counts more where there are few. Found in transformers for the
            parts of an accumulated batch (pull request 24725).""",
        test="test_distributed.py::test_loss_and_gradients_of_n_processes_are_those_of_one",
        edits=[Edit(
            "train_mlm.py", "masked_and_document_loss",
            right="count = average_over_processes(is_masked.sum())",
            wrong="count = is_masked.sum()",
        )],
    ),

    # ------------------------------------------------------------ honest evaluation

    Fault(
        name="held-out texts are trained on",
        symptom="""
            train_mlm.py: the held-out loss in the log is closer to the training loss than
            usual.""",
        reason="""
            The comparison lets the held-out split through. So the held-out loss flatters, and
            finetune.py makes its choices on texts that the model has seen.""",
        test="test_train_mlm.py::test_no_weight_depends_on_held_out_or_test_texts",
        edits=[Edit(
            "train_mlm.py", "main",
            right="texts.select(texts.split == TRAIN)",
            wrong="texts.select(texts.split <= TRAIN + 1)",
        )],
    ),
    Fault(
        name="a test text may also be trained on",
        symptom="""
            The table flatters a little. It flatters more on data that was collected from the
            web, where the same text often stands twice.""",
        reason="""
            All copies are kept. So a text of the test set can also be in the training set.""",
        test="test_splits.py::test_a_duplicate_is_kept_where_it_is_needed_most",
        edits=[Edit(
            SPLITS, "drop_duplicates",
            right="keep[order[first_positions]] = True",
            wrong="keep[order] = True",
        )],
    ),
    Fault(
        name="the test set chooses",
        symptom="""
            finetune.py: the table flatters the columns that have options to choose from. The
            linear probe is as before.""",
        reason="""
            Rates and epochs are chosen where the result is measured. Found in targeted-supcon
            (issue 16), where the test set chose the epoch.""",
        test="test_finetune.py::test_permuting_the_test_labels_changes_no_choice",
        edits=[
            Edit(
                "finetune.py", "held_out_scores",
                right="predictions = column.predict(model, task.held_out)",
                wrong="predictions = column.predict(model, task.test)",
            ),
            Edit(
                "finetune.py", "held_out_scores",
                right="(predictions == task.labels[task.held_out]).double()",
                wrong="(predictions == task.labels[task.test]).double()",
            ),
        ],
    ),
    Fault(
        name="the last test batch is dropped",
        symptom="""
            finetune.py: with 20 test examples every accuracy is a multiple of 6.25 %, and with
            10 it is nan. With 10,000 test examples nobody notices anything.""",
        reason="""
            Only whole batches of 16 count, and the examples behind them are left out. Found in
            Autoformer (issue 104): a test loader with drop_last=True.""",
        test="test_finetune.py::test_chance_is_the_share_of_the_commonest_test_class",
        edits=[Edit(
            "finetune.py", "measure_row",
            right="accuracy = probes.accuracy(predictions, task.labels[task.test])",
            wrong="""
                n = len(predictions) // 16 * 16
                accuracy = probes.accuracy(predictions[:n], task.labels[task.test[:n]])""",
        )],
    ),
    Fault(
        name="the probe moves the encoder's batch norm",
        symptom="""
            finetune.py on images: the linear probe depends on the order of the images, and
            fine-tuning at rate 0 gives other answers than the probe.""",
        reason="""
            In training mode batch norm uses the batch's statistics and moves its running ones.
            So the encoder is another one after its features were taken. Found in virtex (issue
            16).""",
        test="test_finetune.py::test_fine_tuning_images_at_rate_0_is_the_probe",
        edits=[Edit(
            IMAGE_TABLE, "ImageTask.features",
            right="model.eval().encode",
            wrong="model.train().encode",
        )],
    ),
    Fault(
        name="cross-validation on what was fitted",
        symptom="""
            finetune.py: on film reviews the linear probe loses a point with 100 labels a class.
            It takes the weakest penalty for any features, even for pure noise.""",
        reason="""
            The loss is measured on the examples that the weights were fitted to, where a weaker
            penalty is always better.""",
        test="test_probes.py::test_noise_gets_a_strong_penalty_and_signal_a_weak_one",
        edits=[
            Edit(
                PROBES, "cross_validate",
                right="outside = np.flatnonzero(fold == f)",
                wrong="outside = np.flatnonzero(fold != f)",
            ),
        ],
    ),
    Fault(
        name="all draws of labels are the same draw",
        symptom="""
            finetune.py --seeds 5: in the column of the linear probe every row says ± 0.0. The
            table looks more certain than it is.""",
        reason="""
            The number of the draw is not passed on, so the same labels are drawn five times.""",
        test="test_finetune.py::test_all_means_all_but_the_test_set",
        edits=[Edit(
            "finetune.py", "draw_examples",
            right="probes.draw_labels(task.labels[task.train], per_class, seed)",
            wrong="probes.draw_labels(task.labels[task.train], per_class, 0)",
        )],
    ),
]

if __name__ == "__main__":
    sys.exit(main())
