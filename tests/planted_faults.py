"""Would the tests notice? Plant one fault at a time in a copy of the code and run the test that should see it.

    python tests/planted_faults.py                              all of them, a few minutes
    python tests/planted_faults.py bias norm                    those whose name contains one of the words

A fault is a place in a file, what stands there, and what a tired programmer could have written; beside it the test that
must fail. Printed: each fault with the test that caught it, and the score. The exit code is 1 if one went unseen.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
T, A, C, E, F, R, D, P, M = (f"minissl/{name}.py" for name in (
    "transformer", "autoencoder", "contrastive", "evaluation", "finetuning", "training", "datasets", "processes", "muon"))

FAULTS = [      # (what is wrong, file, test_<file>.py::<test>, what stands there, what is planted)
    ("the model sees the unmasked input", T,
     "transformer::copying_the_input_solves_the_textbook_trap",
     "hidden = torch.where(kind < 0.8, MASK, torch.where(kind < 0.9, random, targets))",
     "hidden = targets"),
    ("padding is masked and scored", T,
     "transformer::exactly_the_share_of_each_sequence_is_masked",
     "draw = draw.masked_fill(where >= lengths[:, None], 2)",
     "draw = draw"),
    ("a short text has nothing masked", T,
     "transformer::exactly_the_share_of_each_sequence_is_masked",
     ".floor().clamp(min=1)                  #",
     ".floor()                               #"),
    ("a random replacement can be [MASK] or [PAD]", T,
     "transformer::of_the_masked_80_percent",
     "random = torch.randint(FIRST_ORDINARY, vocabulary_size",
     "random = torch.randint(0, vocabulary_size"),
    ("the mean of the parts' means is taken for the mean", T,
     "transformer::with_count_the_parts_of_a_step",
     "/ (len(targets) if count is None else count)",
     "/ len(targets)"),
    ("attention without its scale", T,
     "transformer::bfloat16_attention_by_hand",
     "score = q * (D // self.heads) ** -0.5 @",
     "score = q @"),
    ("padding is attended to", T,
     "transformer::padding_changes_nothing",
     "visible = None if lengths is None else",
     "visible = None if True else"),
    ("a pair gives a masked token away", T,
     "transformer::counts_of_words_and_pairs",
     "found = torch.where(self.pairs[found] == pair, found, none) if none",
     "found = found if none"),
    ("the sign of R", A,
     "autoencoder::the_loss_is_the_formula",
     "return error + beta * penalty",
     "return error - beta * penalty"),
    ("the squared error is summed over pixels", A,
     "autoencoder::beta_means_the_same",
     "(x - x_hat).square().mean((1, 2, 3))",
     "(x - x_hat).square().sum((1, 2, 3))"),
    ("the covariance keeps its diagonal", A,
     "autoencoder::the_loss_is_the_formula",
     "- covariance.diagonal().square().sum()) /",
     ") /"),
    ("each image has the same patches hidden", A,
     "autoencoder::exactly_the_share_of_patches",
     "draw = torch.rand(B, h * w, generator=generator)",
     "draw = torch.rand(1, h * w, generator=generator).expand(B, -1)"),
    ("the temperature is missing", C,
     "contrastive::info_nce_is_the_formula",
     "s = z @ z.T / temperature",
     "s = z @ z.T"),
    ("self-similarity has a gradient", C,
     "contrastive::info_nce_ignores_self_similarity",
     "s.masked_fill(itself, float(\"-inf\")).logsumexp(1)",
     "(s.exp().sum(1) - math.exp(1 / temperature)).log()"),
    ("a view is its own positive", C,
     "contrastive::info_nce_is_the_formula",
     "another_view = ~torch.eye(V",
     "another_view = torch.eye(V"),
    ("the log-sum-exp overflows", C,
     "contrastive::low_temperature_and_low_precision",
     ".logsumexp(1).view(V, 1, B)",
     ".exp().sum(1).log().view(V, 1, B)"),
    ("BYOL's target takes gradient", C,
     "contrastive::byol_loss_is_the_distance",
     "for t in (prediction, target.detach()))",
     "for t in (prediction, target))"),
    ("BYOL's target moves at the other rate", C,
     "contrastive::the_target_takes_no_gradient",
     "old.lerp_(new, 1 - rate)",
     "old.lerp_(new, rate)"),
    ("the whole batch is cropped alike", C,
     "contrastive::each_image_has_its_own_draw",
     "area = crop + (1 - crop) * numbers[:, 0]",
     "numbers = numbers[:1].expand(len(numbers), -1); area = crop + (1 - crop) * numbers[:, 0]"),
    ("crops of the area, taken for crops of the side", C,
     "contrastive::crop_and_flip_is_bilinear",
     "width, height = (area.sqrt() * ratio)",
     "width, height = (area * ratio)"),
    ("images laid side by side touch", C,
     "contrastive::the_images_of_a_batch_laid_side_by_side",
     "x = F.pad(x, (0, stride - W % stride))",
     "x = F.pad(x, (stride - W % stride, 0))"),
    ("the schedule ends a step late", R,
     "training::the_rate_climbs_rests_and_falls",
     "(steps - step) / max(decay",
     "(steps - step + 1) / max(decay"),
    ("a draw that forgets its step", R,
     "training::draws_are_a_function",
     "f\"{seed} {purpose} {step}\"",
     "f\"{seed} {purpose}\""),
    ("momentum without Nesterov", M,
     "training::muon_remembers",
     "update = gradient.add(state[\"momentum\"], alpha=group[\"momentum\"])",
     "update = state[\"momentum\"].clone()"),
    ("losses before a save are forgotten", R,
     "train_mlm::a_stopped_and_resumed_run",
     "self.counted, self.losses = int(counted), [",
     "self.counted, self.losses = 0, ["),
    ("a checkpoint's checksums are not read", "minissl/files.py",
     "training::a_flipped_bit",
     "if broken := archive.testzip():",
     "if broken := None:"),
    ("the last test batch is dropped", E,
     "train_images::every_image_is_counted",
     "for begin in range(0, len(images), batch):",
     "for begin in range(0, max(1, len(images) - batch + 1), batch):"),
    ("neighbours vote from the wrong side", E,
     "finetune::nearest_neighbours_vote",
     "weight, index = similarity.topk(",
     "weight, index = (-similarity).topk("),
    ("the penalty is on the bias, too", E,
     "finetune::logistic_regression_finds_the_minimum",
     "strength * weights[:-1], error.sum(0, keepdim=True)])",
     "strength * weights[:-1], error.sum(0, keepdim=True) + strength * weights[-1:]])"),
    ("the probe trains the encoder", F,
     "train_images::a_probe_moves_neither",
     "lambda images: model.eval().features(",
     "lambda images: model.train().features("),
    ("choices are made on the test set", "finetune.py",
     "finetune::permuting_the_test_labels",
     "task.held_out) for seed, which in enumerate(draws)]\n"
     "        scores.append(np.mean([evaluation.accuracy(answers, task.labels[task.held_out])",
     "task.test) for seed, which in enumerate(draws)]\n"
     "        scores.append(np.mean([evaluation.accuracy(answers, task.labels[task.test])"),
    ("a test text that stands in training, too, stays there", D,
     "datasets::a_twin_is_dropped",
     "keep[order[first]] = True",
     "keep[:] = True"),
    ("a window is guessed from itself", D,
     "datasets::an_epoch_of_windows",
     "rest[(place >= offsets[owner]) & (place < (offsets + sizes)[owner])] = PAD",
     "rest[:0] = PAD"),
    ("a gather that returns 1/N of the gradient", P,
     "processes::loss_and_gradients_of_four_processes",
     "        dist.all_reduce(gradient)\n        return gradient",
     "        return gradient"),
    ("distant positions alike in bfloat16", T,
     "transformer::bfloat16_knows",
     "exact = torch.promote_types(x.dtype, torch.float32)",
     "exact = x.dtype"),
    ("windows from the beginning of a text only", D,
     "datasets::windows_lie_anywhere",
     "self.offsets = (draw[1] * (self.texts.lengths",
     "self.offsets = (0 * draw[1] * (self.texts.lengths"),
    ("the same half is read each time", D,
     "datasets::of_a_document_another_half",
     "generator(self.seed, \"coin\", step)",
     "generator(self.seed, \"coin\", 0)"),
    ("the rarest pairs", D,
     "datasets::pairs_are_counted",
     "best = np.argsort(-counts, kind=\"stable\")",
     "best = np.argsort(counts, kind=\"stable\")"),
    ("the first stage guesses what it has read", "train_mlm.py",
     "train_mlm::the_gradient_of_a_step",
     "model.count_terms(unread[mine]",
     "model.count_terms(read[mine]"),
    ("masks that are not drawn anew", "train_mlm.py",
     "train_mlm::no_draw_of_a_run",
     "generator(settings.seed, \"mask\", step)",
     "generator(settings.seed, \"mask\", 0)"),
    ("held-out texts are trained on", "train_mlm.py",
     "train_mlm::no_weight_depends",
     "texts.select(texts.split == TRAIN)",
     "texts.select(texts.split < 2)"),
    ("the mirror's number decides on the colours, too", C,
     "contrastive::each_number_of_a_view",
     "numbers[:, 5:], jitter, hue, grey)",
     "numbers[:, 4:], jitter, hue, grey)"),
    ("BYOL predicts another image", "train_contrastive.py",
     "train_images::the_gradient_of_a_step",
     ".roll(1, 0)",
     ".roll(1, 1)"),
    ("the corrupted image is to be rebuilt", "train_ae.py",
     "train_images::the_gradient_of_a_step",
     "autoencoder_loss(images, rebuilt",
     "autoencoder_loss(given, rebuilt"),
    ("cross-validation on what was fitted", E,
     "finetune::cross_validation_takes",
     "rows(x, outside), torch.from_numpy(labels[outside])",
     "rows(x, inside), torch.from_numpy(labels[inside])"),
    ("features in the order of the lengths", E,
     "finetune::rows_of_features",
     "result[torch.from_numpy(order)] = torch.cat(features)",
     "result[:] = torch.cat(features)"),
    ("from scratch starts at the pretrained table", F,
     "finetune::from_scratch_owes",
     "table = 0.1 * torch.randn(",
     "table = self.table + 0 * torch.randn("),
    ("all draws of labels are one", "finetune.py",
     "finetune::all_means_all",
     "draw_labels(task.labels[pool], size, seed)",
     "draw_labels(task.labels[pool], size, 0)"),
    ("the greatest of each quadrant for its mean", A,
     "autoencoder::features_are_means",
     "F.adaptive_avg_pool2d(self.maps(x), 2)",
     "F.adaptive_max_pool2d(self.maps(x), 2)"),
    ("a learned scale behind the code", A,
     "autoencoder::no_weight_makes",
     "nn.BatchNorm1d(code, affine=False)",
     "nn.BatchNorm1d(code)"),
    ("a rank of what does not vary", C,
     "contrastive::alignment_uniformity",
     "torch.linalg.svdvals(z.float() - z.float().mean(0))",
     "torch.linalg.svdvals(z.float())"),
    ("BYOL's target stands still at first, not at last", "train_contrastive.py",
     "train_images::rates_fall",
     "(1 + math.cos(math.pi",
     "(1 - math.cos(math.pi"),
    ("another learning rate on --resume", R,
     "train_images::what_changes_the_learning",
     "\"evaluate_every\", \"save_every\"}",
     "\"evaluate_every\", \"save_every\", \"learning_rate\"}"),
    ("a probe that is not fitted on all its labels", E,
     "finetune::the_probe_is_fitted",
     "return logistic_regression(x, labels, classes, strengths[best], near[best]), strengths[best]",
     "return near[best], strengths[best]"),
    ("features on the scale of the test images, too", F,
     "train_images::features_are_standardised",
     "standardised(self.features(self.model), self.train)",
     "standardised(self.features(self.model), np.arange(len(self.labels)))"),
    ("from scratch with a frozen batch norm", F,
     "train_images::an_image_encoder_from_scratch",
     "smoothing=0.1, frozen_norm=False)",
     "smoothing=0.1, frozen_norm=True)"),
    ("the components of least variance", F,
     "train_images::the_principal_components",
     "directions[:self.code].T",
     "directions[-self.code:].T"),
    ("the test batch is trained on", "minissl/images.py",
     "images::cifar10_is_read",
     "np.repeat(np.uint8([TRAIN, HELD_OUT, TEST]), [45_000, 5_000, 10_000])",
     "np.repeat(np.uint8([TEST, HELD_OUT, TRAIN]), [10_000, 5_000, 45_000])"),
]


def copy_of_the_code(folder):
    left_out = shutil.ignore_patterns(".git", "runs", "data", "__pycache__", ".venv")
    return Path(shutil.copytree(ROOT, folder, ignore=left_out))


def change(copy, name, file, old, new):
    """Put `new` in the place of `old`, which must stand once in the file of the copy. -> the file as it was"""
    source = (copy / file).read_text(encoding="utf-8")
    if source.count(old) != 1:
        raise SystemExit(f"{name}: {file} has {source.count(old)} of {old!r}; mend this list")
    (copy / file).write_text(source.replace(old, new), encoding="utf-8")
    return source


def main(words):
    seen, missed = 0, []
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_the_code(Path(folder) / "minissl")
        for name, file, test, old, new in FAULTS:
            if words and not any(word in name for word in words):
                continue
            source = change(copy, name, file, old, new)
            module, test = test.split("::")
            command = [sys.executable, *"-m pytest -x -q -p no:cacheprovider".split(), f"tests/test_{module}.py", "-k", test]
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
            (copy / file).write_text(source, encoding="utf-8")
            caught = done.returncode == 1 and "failed" in done.stdout     # others: no test ran, or an error of pytest's
            seen += caught
            missed += [name] * (not caught)
            print(f"{'caught' if caught else 'UNSEEN'}  {name}  ({module}: {test})", flush=True)
    print(f"{seen} of {seen + len(missed)} faults were caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
