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
T, A, C, E, F, R, D, P, M = ("minissl/transformer.py", "minissl/autoencoder.py", "minissl/contrastive.py", "minissl/evaluation.py",
                          "minissl/finetuning.py", "minissl/training.py", "minissl/datasets.py", "minissl/processes.py", "minissl/muon.py")

FAULTS = [      # (what is wrong, file, what stands there, what is planted, tests/test_<file>.py::<test>)
    ("the model sees the unmasked input", T, "hidden = torch.where(kind < 0.8, MASK, torch.where(kind < 0.9, random, targets))",
     "hidden = targets", "transformer::copying_the_input_solves_the_textbook_trap"),
    ("padding is masked and scored", T, "draw = draw.masked_fill(where >= lengths[:, None], 2)", "draw = draw",
     "transformer::exactly_the_share_of_each_sequence_is_masked"),
    ("a short text has nothing masked", T, ".floor().clamp(min=1)                  #", ".floor()                               #",
     "transformer::exactly_the_share_of_each_sequence_is_masked"),
    ("a random replacement can be [MASK] or [PAD]", T, "random = torch.randint(FIRST_ORDINARY, vocabulary_size",
     "random = torch.randint(0, vocabulary_size", "transformer::of_the_masked_80_percent"),
    ("the mean of the parts' means is taken for the mean", T, "/ (len(targets) if count is None else count)", "/ len(targets)",
     "transformer::with_count_the_parts_of_a_step"),
    ("attention without its scale", T, "score = q * (D // self.heads) ** -0.5 @", "score = q @", "transformer::bfloat16_attention_by_hand"),
    ("padding is attended to", T, "visible = None if lengths is None else", "visible = None if True else", "transformer::padding_changes_nothing"),
    ("a pair gives a masked token away", T, "found = torch.where(self.pairs[found] == pair, found, none) if none",
     "found = found if none", "transformer::counts_of_words_and_pairs"),
    ("the sign of R", A, "return error + beta * penalty", "return error - beta * penalty", "autoencoder::the_loss_is_the_formula"),
    ("the squared error is summed over pixels", A, "(x - x_hat).square().mean((1, 2, 3))", "(x - x_hat).square().sum((1, 2, 3))",
     "autoencoder::beta_means_the_same"),
    ("the covariance keeps its diagonal", A, "- covariance.diagonal().square().sum()) /", ") /", "autoencoder::the_loss_is_the_formula"),
    ("each image has the same patches hidden", A, "draw = torch.rand(B, h * w, generator=generator)",
     "draw = torch.rand(1, h * w, generator=generator).expand(B, -1)", "autoencoder::exactly_the_share_of_patches"),
    ("the temperature is missing", C, "s = z @ z.T / temperature", "s = z @ z.T", "contrastive::info_nce_is_the_formula"),
    ("self-similarity has a gradient", C, 's.masked_fill(itself, float("-inf")).logsumexp(1)',
     "(s.exp().sum(1) - math.exp(1 / temperature)).log()", "contrastive::info_nce_ignores_self_similarity"),
    ("a view is its own positive", C, "another_view = ~torch.eye(V", "another_view = torch.eye(V", "contrastive::info_nce_is_the_formula"),
    ("the log-sum-exp overflows", C, '.logsumexp(1).view(V, 1, B)', ".exp().sum(1).log().view(V, 1, B)", "contrastive::low_temperature_and_low_precision"),
    ("BYOL's target takes gradient", C, "for t in (prediction, target.detach()))", "for t in (prediction, target))", "contrastive::byol_loss_is_the_distance"),
    ("BYOL's target moves at the other rate", C, "old.lerp_(new, 1 - rate)", "old.lerp_(new, rate)", "contrastive::the_target_takes_no_gradient"),
    ("the whole batch is cropped alike", C, "area = crop + (1 - crop) * numbers[:, 0]", "numbers = numbers[:1].expand(len(numbers), -1); area = crop + (1 - crop) * numbers[:, 0]",
     "contrastive::each_image_has_its_own_draw"),
    ("crops of the area, taken for crops of the side", C, "width, height = (area.sqrt() * ratio)", "width, height = (area * ratio)",
     "contrastive::crop_and_flip_is_bilinear"),
    ("images laid side by side touch", C, "x = F.pad(x, (0, stride - W % stride))", "x = F.pad(x, (stride - W % stride, 0))",
     "contrastive::the_images_of_a_batch_laid_side_by_side"),
    ("the schedule ends a step late", R, "(steps - step) / max(decay", "(steps - step + 1) / max(decay", "training::the_rate_climbs_rests_and_falls"),
    ("a draw that forgets its step", R, 'f"{seed} {purpose} {step}"', 'f"{seed} {purpose}"', "training::draws_are_a_function"),
    ("momentum without Nesterov", M, 'update = gradient.add(state["momentum"], alpha=group["momentum"])', 'update = state["momentum"].clone()',
     "training::muon_remembers"),
    ("losses before a save are forgotten", R, "self.counted, self.losses = int(counted), [", "self.counted, self.losses = 0, [",
     "train_mlm::a_stopped_and_resumed_run"),
    ("a checkpoint's checksums are not read", "minissl/files.py", "if broken := archive.testzip():", "if broken := None:",
     "training::a_flipped_bit"),
    ("the last test batch is dropped", E, "for begin in range(0, len(images), batch):", "for begin in range(0, max(1, len(images) - batch + 1), batch):",
     "train_images::every_image_is_counted"),
    ("neighbours vote from the wrong side", E, "weight, index = similarity.topk(", "weight, index = (-similarity).topk(", "finetune::nearest_neighbours_vote"),
    ("the penalty is on the bias, too", E, "strength * weights[:-1], error.sum(0, keepdim=True)])",
     "strength * weights[:-1], error.sum(0, keepdim=True) + strength * weights[-1:]])", "finetune::logistic_regression_finds_the_minimum"),
    ("the probe trains the encoder", F, "lambda images: model.eval().features(", "lambda images: model.train().features(",
     "train_images::a_probe_moves_neither"),
    ("choices are made on the test set", "finetune.py", "task.held_out) for seed, which in enumerate(draws)]\n        scores.append("
     "np.mean([evaluation.accuracy(answers, task.labels[task.held_out])", "task.test) for seed, which in enumerate(draws)]\n        "
     "scores.append(np.mean([evaluation.accuracy(answers, task.labels[task.test])", "finetune::permuting_the_test_labels"),
    ("a test text that stands in training, too, stays there", D, "keep[order[first]] = True", "keep[:] = True", "datasets::a_twin_is_dropped"),
    ("a window is guessed from itself", D, "rest[(place >= offsets[owner]) & (place < (offsets + sizes)[owner])] = PAD", "rest[:0] = PAD",
     "datasets::an_epoch_of_windows"),
    ("a gather that returns 1/N of the gradient", P, "        dist.all_reduce(gradient)\n        return gradient", "        return gradient",
     "processes::loss_and_gradients_of_four_processes"),
    ("distant positions alike in bfloat16", T, "exact = torch.promote_types(x.dtype, torch.float32)", "exact = x.dtype", "transformer::bfloat16_knows"),
    ("windows from the beginning of a text only", D, "self.offsets = (draw[1] * (self.texts.lengths", "self.offsets = (0 * draw[1] * (self.texts.lengths",
     "datasets::windows_lie_anywhere"),
    ("the same half is read each time", D, 'generator(self.seed, "coin", step)', 'generator(self.seed, "coin", 0)', "datasets::of_a_document_another_half"),
    ("the rarest pairs", D, 'best = np.argsort(-counts, kind="stable")', 'best = np.argsort(counts, kind="stable")', "datasets::pairs_are_counted"),
    ("the first stage guesses what it has read", "train_mlm.py", "model.count_terms(unread[mine]", "model.count_terms(read[mine]",
     "train_mlm::the_gradient_of_a_step"),
    ("masks that are not drawn anew", "train_mlm.py", 'generator(settings.seed, "mask", step)', 'generator(settings.seed, "mask", 0)',
     "train_mlm::no_draw_of_a_run"),
    ("held-out texts are trained on", "train_mlm.py", "texts.select(texts.split == TRAIN)", "texts.select(texts.split < 2)",
     "train_mlm::no_weight_depends"),
    ("the mirror's number decides on the colours, too", C, "numbers[:, 5:], jitter, hue, grey)", "numbers[:, 4:], jitter, hue, grey)",
     "contrastive::each_number_of_a_view"),
    ("BYOL predicts another image", "train_contrastive.py", ".roll(1, 0)", ".roll(1, 1)", "train_images::the_gradient_of_a_step"),
    ("the corrupted image is to be rebuilt", "train_ae.py", "autoencoder_loss(images, rebuilt", "autoencoder_loss(given, rebuilt",
     "train_images::the_gradient_of_a_step"),
    ("cross-validation on what was fitted", E, "rows(x, outside), torch.from_numpy(labels[outside])", "rows(x, inside), torch.from_numpy(labels[inside])",
     "finetune::cross_validation_takes"),
    ("features in the order of the lengths", E, "result[torch.from_numpy(order)] = torch.cat(features)", "result[:] = torch.cat(features)",
     "finetune::rows_of_features"),
    ("from scratch starts at the pretrained table", F, "table = 0.1 * torch.randn(", "table = self.table + 0 * torch.randn(", "finetune::from_scratch_owes"),
    ("all draws of labels are one", "finetune.py", "draw_labels(task.labels[pool], size, seed)", "draw_labels(task.labels[pool], size, 0)",
     "finetune::all_means_all"),
    ("the greatest of each quadrant for its mean", A, "F.adaptive_avg_pool2d(self.maps(x), 2)", "F.adaptive_max_pool2d(self.maps(x), 2)",
     "autoencoder::features_are_means"),
    ("a learned scale behind the code", A, "nn.BatchNorm1d(code, affine=False)", "nn.BatchNorm1d(code)", "autoencoder::no_weight_makes"),
    ("a rank of what does not vary", C, "torch.linalg.svdvals(z.float() - z.float().mean(0))", "torch.linalg.svdvals(z.float())",
     "contrastive::alignment_uniformity"),
    ("BYOL's target stands still at first, not at last", "train_contrastive.py", "(1 + math.cos(math.pi", "(1 - math.cos(math.pi", "train_images::rates_fall"),
    ("another learning rate on --resume", R, '"evaluate_every", "save_every"}', '"evaluate_every", "save_every", "learning_rate"}',
     "train_images::what_changes_the_learning"),
    ("a probe that is not fitted on all its labels", E, "return logistic_regression(x, labels, classes, strengths[best], near[best]), strengths[best]",
     "return near[best], strengths[best]", "finetune::the_probe_is_fitted"),
    ("features on the scale of the test images, too", F, "standardised(self.features(self.model), self.train)",
     "standardised(self.features(self.model), np.arange(len(self.labels)))", "train_images::features_are_standardised"),
    ("from scratch with a frozen batch norm", F, "smoothing=0.1, frozen_norm=False)", "smoothing=0.1, frozen_norm=True)",
     "train_images::an_image_encoder_from_scratch"),
    ("the components of least variance", F, "directions[:self.code].T", "directions[-self.code:].T", "train_images::the_principal_components"),
    ("the test batch is trained on", "minissl/images.py", "np.repeat(np.uint8([TRAIN, HELD_OUT, TEST]), [45_000, 5_000, 10_000])",
     "np.repeat(np.uint8([TEST, HELD_OUT, TRAIN]), [10_000, 5_000, 45_000])", "images::cifar10_is_read"),
]


def copy_of_the_code(folder):
    return Path(shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "runs", "data", "__pycache__", ".venv")))


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
        for name, file, old, new, test in FAULTS:
            if words and not any(word in name for word in words):
                continue
            source = change(copy, name, file, old, new)
            module, test = test.split("::")
            done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/test_{module}.py", "-k", test],
                                  cwd=copy, capture_output=True, text=True)
            (copy / file).write_text(source, encoding="utf-8")
            caught = done.returncode == 1 and "failed" in done.stdout              # 1: tests failed; others: none ran, or an error of pytest's
            seen += caught
            missed += [name] * (not caught)
            print(f"{'caught' if caught else 'UNSEEN'}  {name}  ({module}: {test})", flush=True)
    print(f"{seen} of {seen + len(missed)} faults were caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
