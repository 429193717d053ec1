"""Fine-tuning, probes and the baseline: what they may see, and that they count everything."""

import csv
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import finetune
from minissl import UserError, datasets, documents, evaluation, files, finetuning, runs


@pytest.fixture
def few_options(monkeypatch):
    probe = evaluation.probe
    monkeypatch.setattr(finetuning, "SCRATCH_RATES", (0.03, 0.3))
    monkeypatch.setattr(finetuning, "TUNED_RATES", (0.0, 0.03))
    monkeypatch.setattr(evaluation, "probe", lambda x, labels, classes, strengths: (
        probe(x, labels, classes, strengths[1::3])))


def test_the_table_has_every_row_and_column_and_lands_in_csv_and_page(trained, run_script, few_options):
    code, printed = run_script(finetune, trained, "--labels", 10, "all", "--seeds", 2,
                               "--data-dir", trained.parent / "data")
    assert code == 0, printed
    with open(trained / "finetune.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(r["labels_a_class"], r["method"]) for r in rows} == {
        (labels, method) for labels in ("10", "all")
        for method in ("tf-idf", "from scratch", "linear probe", "fine-tuned")}
    best = [float(r["test_accuracy"]) for r in rows if r["labels_a_class"] == "10" and r["method"] == "linear probe"]
    assert np.mean(best) > 90          # the two topics share almost no noun: a probe that fails here is broken
    assert "fine-tuned" in (trained / "report.html").read_text(encoding="utf-8")

    (trained.parent / "new.txt").write_text("the ship sails\nthe tower opens\n", encoding="utf-8")
    code, printed = run_script(finetune, trained, "--predict", trained.parent / "new.txt")
    assert code == 0 and [line.split("\t")[0] for line in printed.splitlines()[:2]] == ["sea", "city"], printed


def test_the_probe_can_be_had_alone_and_leaves_the_table_as_it_is(trained, run_script):
    files = [trained / name for name in ("finetune.csv", "classifier.pt")]
    before = [path.read_bytes() if path.exists() else None for path in files]
    code, printed = run_script(finetune, trained, "--probe", "--labels", 2, 5, "--seeds", 2,
                               "--data-dir", trained.parent / "data")
    assert code == 0 and [path.read_bytes() if path.exists() else None for path in files] == before, printed
    with open(trained / "probe.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(row["labels_a_class"], row["method"]) for row in rows]
    assert found == [("2", "linear probe")] * 2 + [("5", "linear probe")] * 2


def test_ctrl_c_keeps_the_rows_that_are_finished(trained, run_script, few_options, monkeypatch):
    one_row = finetune.one_row

    def interrupted(settings, task, columns, row):
        if row == stop:
            raise KeyboardInterrupt
        return one_row(settings, task, columns, row)
    monkeypatch.setattr(finetune, "one_row", interrupted)
    flags = ["--labels", 2, 5, "--seeds", 1, "--data-dir", trained.parent / "data"]
    for name in "finetune.csv", "classifier.pt":
        (trained / name).unlink(missing_ok=True)
    stop = "2"
    assert run_script(finetune, trained, *flags)[0] == 130 and not (trained / "finetune.csv").exists()
    stop = "5"
    code, printed = run_script(finetune, trained, *flags)
    assert code == 0 and "stopped: the rows before" in printed and (trained / "classifier.pt").exists()
    with open(trained / "finetune.csv", encoding="utf-8", newline="") as file:
        assert {row["labels_a_class"] for row in csv.DictReader(file)} == {"2"}
    page = (trained / "report.html").read_text(encoding="utf-8")
    data = files.load_checkpoint(trained)["settings"]["data"]
    assert f"draws of labels: {data}, after 90 steps of pretraining" in page


def test_a_table_is_not_begun_where_it_cannot_be_kept(trained, run_script, monkeypatch):
    monkeypatch.setattr(finetune, "writable", lambda folder: False)
    code, printed = run_script(finetune, trained, "--labels", 2, "--data-dir", trained.parent / "data")
    assert code == 2 and "one cannot write into it" in printed.splitlines()[-1] and "draw 1" not in printed


def test_a_class_that_lost_its_doubled_texts_is_named_with_the_reason(trained, corpus, run_script, tmp_path):
    for name, source in dict(sea="sea", city="city", backup="city").items():
        shutil.copytree(corpus / source, tmp_path / "texts" / name)
    code, printed = run_script(finetune, trained, "--data", tmp_path / "texts", "--data-dir", tmp_path, "--probe")
    assert code == 0 and "texts dropped that stand elsewhere in the data, too" in printed, printed
    assert "the smallest class, city, has 0 to train on" in printed or "the smallest class, backup, has 0" in printed


def test_permuting_the_test_labels_changes_no_choice_and_no_weight(trained, run_script, few_options, monkeypatch):
    made, load = [], documents.load_texts

    def keep(settings, checkpoint, name, classes, results, chance):
        made.append({k: v.clone() for k, v in results[-1][-1].state_dict().items()})
    monkeypatch.setattr(finetune, "write_results", keep)
    choose, accuracy, seen = finetune.choose, evaluation.accuracy, []

    def watched(*arguments):
        with pytest.MonkeyPatch.context() as patch:                # what the choices rest on
            patch.setattr(evaluation, "accuracy", lambda *a: seen.append(accuracy(*a)) or seen[-1])
            return choose(*arguments)
    monkeypatch.setattr(finetune, "choose", watched)

    def permuted(*arguments, **options):
        texts = load(*arguments, **options)
        test = np.flatnonzero(texts.split == datasets.TEST)
        texts.labels = texts.labels.copy()
        texts.labels[test] = texts.labels[test][::-1]
        return texts
    for loader in (load, permuted):
        monkeypatch.setattr(finetune, "load_texts", loader)
        code, printed = run_script(finetune, trained, "--labels", 2, "--seeds", 1,
                                   "--data-dir", trained.parent / "data")
        assert code == 0, printed
    assert len(seen) > 10 and seen[:len(seen) // 2] == seen[len(seen) // 2:]
    assert made[0].keys() == made[1].keys() and all(torch.equal(made[0][k], made[1][k]) for k in made[0])


def test_all_means_all_that_is_not_for_the_test_and_each_draw_is_another(trained, run_script, monkeypatch):
    asked, fit = [], finetuning.Linear.fit
    monkeypatch.setattr(finetuning.Linear, "fit",
                        lambda self, which, *more: asked.append(tuple(which)) or fit(self, which, *more))
    code, printed = run_script(finetune, trained, "--probe", "--labels", 2, "all", "--seeds", 3,
                               "--data-dir", trained.parent / "data")
    assert code == 0 and len(set(asked[:3])) == 3, printed
    assert [len(which) for which in asked] == [4] * 3 + [160] * 2


def test_the_option_is_chosen_that_is_best_on_held_out_examples():
    labels = torch.tensor([0, 1] * 30)
    task = SimpleNamespace(labels=labels, train=np.arange(40), held_out=np.arange(40, 50), test=np.arange(50, 60),
                           trials=2)
    right = {"a": np.zeros(60, bool), "b": np.arange(60) < 50, "c": np.arange(60) >= 50}         # c: on the test set
    column = finetuning.Column(lambda which, option, seed: option, lambda option, which: torch.where(
        torch.from_numpy(right[option][which]), labels[which], 1 - labels[which]), lambda n: ["a", "b", "c"])
    assert finetune.choose(column, task, 3) == "b" and finetune.choose(column, task, None) == "b"


def test_chance_is_the_share_of_the_commonest_class_in_the_test_set(capsys):
    labels = torch.tensor([0, 1] * 10 + [0, 1, 1, 1] * 2)
    column = finetuning.Column(lambda which, option, seed: None, lambda fitted, which: torch.ones(len(which)),
                               lambda n: [None])
    task = SimpleNamespace(labels=labels, train=np.arange(10), held_out=np.arange(10, 20), test=np.arange(20, 28),
                           classes=["a", "b"], probe=column, trials=1)
    ((_, found, _),), chance = finetune.table(SimpleNamespace(labels=["2"], seeds=2, probe=True), task)
    assert (chance == 75 and found["linear probe"][0] == [75, 75]
            and "commonest class is 75.0 %" in capsys.readouterr().out)


def text_task(trained, change=lambda model: None):
    model, checkpoint = runs.load_run(trained)
    change(model)
    settings = checkpoint["settings"]
    texts = documents.load_texts(settings["data"], settings["data_dir"], settings["vocabulary_size"],
                                 tokenizer=runs.tokenizer_of(checkpoint))
    return finetuning.TextTask(texts, model, nullcontext(), torch.device("cpu"))


def test_from_scratch_owes_nothing_to_the_pretrained_weights(trained):
    def randomise(model):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    fitted = []
    for change in (lambda model: None, randomise):
        task = text_task(trained, change)
        fitted.append(task.columns()["from scratch"].fit(task.train[::5], (0.03, 2), 0).state_dict())
    assert all(torch.equal(fitted[0][name], fitted[1][name]) for name in fitted[0])


def test_fine_tuning_a_text_encoder_at_rate_0_is_the_probe(trained):
    task = text_task(trained)
    which = task.train[::10]
    still = task.columns()["fine-tuned"].fit(which, (0.0, 2), 0)
    with torch.no_grad():
        found = still(evaluation.rows(task.counts, task.test), task.context[task.test], task.words[task.test])
    wanted = evaluation.predict(task.z[task.test], task.probe.fit(which)[0])
    assert wanted.abs().max() > 0.1 and task.context.abs().max() > 1e-3    # the blocks have a part in it
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def test_rows_of_features_follow_the_texts_whatever_their_lengths(trained):
    model, checkpoint = runs.load_run(trained)
    strings = ["the ship waits", "the tower rises and the tram opens and the crowd sleeps " * 9, "a storm",
               "the island drifts " * 30]
    features = runs.load_encoder(trained)(strings)
    for row, string in zip(features, strings):
        tokens = torch.from_numpy(runs.tokenizer_of(checkpoint).encode(string).astype(np.int64))[None]
        with torch.no_grad():
            T, parts = tokens.shape[1], -(-tokens.shape[1] // model.window)
            ends = [T * part // parts for part in range(1, parts)]
            alone = sum(model.encode(part, torch.tensor([part.shape[1]]))[0] * part.shape[1] / T
                        for part in tokens.tensor_split(ends, 1))
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)


def test_features_are_written_one_row_a_text(trained, corpus, run_script, tmp_path):
    code, _ = run_script(finetune, trained, "--features", tmp_path / "out.npy", "--data", corpus,
                         "--data-dir", tmp_path)
    features = np.load(tmp_path / "out.npy")
    assert code == 0 and features.shape == (200, 32) and features.dtype == np.float32
    texts = [(corpus / "city" / f"{n:03}.txt").read_text(encoding="utf-8") for n in (0, 7)]
    np.testing.assert_allclose(runs.load_encoder(trained)(texts), features[[0, 7]], atol=0.02 * np.abs(features).max())


def test_files_that_came_after_the_pretraining_are_warned_of(trained, corpus, run_script, tmp_path):
    shutil.copytree(corpus, tmp_path / "texts")
    checkpoint = files.load_checkpoint(trained)
    checkpoint["settings"] |= dict(data=str(tmp_path / "texts"), data_dir=str(tmp_path / "data"))
    (tmp_path / "run").mkdir()
    files.write_checkpoint(tmp_path / "run" / "checkpoint.pt", checkpoint)
    flags = [tmp_path / "run", "--labels", 5, "--seeds", 1, "--probe"]
    code, printed = run_script(finetune, *flags)
    assert code == 0 and "mind:" not in printed, printed
    for n in range(10):                                                  # what was the test set moves into training
        (tmp_path / "texts" / "sea" / f"z{n}.txt").write_text(f"New text number {n}.", encoding="utf-8")
    code, printed = run_script(finetune, *flags)
    assert code == 0 and "so test texts may be among them" in printed, printed


def test_a_file_of_a_folder_has_one_row_of_features_in_the_order_of_the_paths_doubled_or_long(
        trained, corpus, run_script, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "TEXT_BYTES", 50)                     # longer than four times that, they are long
    for name, source in (("b/1.txt", "city/000.txt"), ("a/2.txt", "sea/000.txt"), ("a/10.txt", "city/000.txt")):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_bytes((corpus / source).read_bytes())
    (tmp_path / "texts" / "a" / "11.txt").write_text(" \n", encoding="utf-8")
    code, printed = run_script(finetune, trained, "--features", tmp_path / "out.npy", "--data", tmp_path / "texts")
    assert code == 0 and "passed over: 1 empty" in printed, printed
    first, second, third = np.load(tmp_path / "out.npy")                 # a/10, a/2, b/1
    assert np.array_equal(first, third) and not np.allclose(first, second, atol=0.1)


@pytest.mark.parametrize("flags, sentence", [
    (["--labels", "1", "1000"], "--labels 1000: too many"), (["--labels", "some"], "whole numbers above 0, or all"),
    (["--predict", "not/there.txt"], "not/there.txt"), (["--data", "not/there"], "there is nothing there"),
    (["--predict", "a.txt", "--features", "b.npy"], "give one of them"),
    (["--features", "not/there/b.npy"], "one can write into"),
    (["--features", f"{__file__}/b.npy"], "one can write into"), (["--features", "out.txt"], "a new .npy"),
    (["--predict", "."], "a folder; give a .txt"), (["--data", "cifar10"], "learned from texts")])
def test_what_cannot_be_done_is_said_in_one_sentence(flags, sentence, trained, run_script):
    code, printed = run_script(finetune, trained, "--data-dir", trained.parent / "data", *flags)
    assert code == 2 and sentence in printed.splitlines()[-1] and "Traceback" not in printed and "draw 1" not in printed


def test_a_file_without_text_and_a_string_that_is_no_list_are_refused(trained, run_script, tmp_path):
    (tmp_path / "blank.txt").write_text("\n \n", encoding="utf-8")
    code, printed = run_script(finetune, trained, "--predict", tmp_path / "blank.txt")
    assert code == 2 and "there is no text in it" in printed.splitlines()[-1]
    with pytest.raises(UserError, match="one string where a list of strings"):
        runs.load_encoder(trained)("the ship sails")
    with pytest.raises(UserError, match="must be a str"):
        runs.load_encoder(trained)(["the ship sails", None])


def test_a_folder_that_is_no_run_is_refused(tmp_path, run_script):
    code, printed = run_script(finetune, tmp_path)
    assert code == 2 and "there is no such file" in printed
    (tmp_path / "checkpoint.pt").write_bytes(b"rubbish")
    code, printed = run_script(finetune, tmp_path)
    assert code == 2 and "damaged or another program's" in printed


# ---------------------------------------------------------------- the pieces

def test_accuracy_counts_every_item_at_any_batch_size(trained, corpus, tmp_path):
    texts = documents.load_texts(str(corpus), tmp_path, 400)
    encode = lambda tokens, lengths: torch.stack([lengths, tokens.sum(1) / lengths], 1).float()
    texts = texts.select(np.resize(np.arange(37), 777))                  # several batches
    for window in (1000, 20, 1):
        model = SimpleNamespace(window=window, document_columns=2, encode=encode)
        found = evaluation.text_features(model, texts, nullcontext())
        assert window < 1000 or found[:, 0].tolist() == texts.lengths.tolist()
        assert found[:, 1].tolist() == pytest.approx([texts[n].mean() for n in range(777)])


def test_label_draws_are_balanced_repeatable_and_without_replacement():
    labels = np.array([0, 1, -1, 1, 0, 1, 1, 0, -1])
    drawn = evaluation.draw_labels(labels, 2, seed=3)
    assert len(set(drawn)) == 4 and sorted(labels[drawn]) == [0, 0, 1, 1]
    assert (drawn == evaluation.draw_labels(labels, 2, seed=3)).all()
    assert len({tuple(evaluation.draw_labels(labels, 2, seed)) for seed in range(9)}) > 1
    assert (evaluation.draw_labels(labels, None, 0) == np.flatnonzero(labels >= 0)).all()
    with pytest.raises(ValueError, match="class 0 has 3 labelled examples, not 4"):
        evaluation.draw_labels(labels, 4, 0)


def test_logistic_regression_finds_the_minimum_and_sparse_equals_dense():
    torch.manual_seed(0)
    x, labels = torch.randn(60, 5) * (torch.rand(60, 5) < 0.5), torch.randint(0, 3, (60,))
    found = evaluation.logistic_regression(x, labels, 3, 0.1).double().requires_grad_()
    loss = F.cross_entropy(x.double() @ found[:-1] + found[-1], labels) + 0.05 * found[:-1].square().sum()
    loss.backward()
    assert found.grad.abs().max() < 1e-4                          # convex: no gradient, no better place
    owner, term = x.nonzero(as_tuple=True)
    sparse = evaluation.csr(F.pad(torch.bincount(owner, minlength=60).cumsum(0), (1, 0)), term, x[owner, term], x.shape)
    torch.testing.assert_close(evaluation.logistic_regression(sparse, labels, 3, 0.1), found.detach().float(),
                               atol=1e-3, rtol=1e-3)
    wide, few = torch.randn(8, 30), labels[:8]    # more features than examples: solved in the examples' span
    found = evaluation.logistic_regression(wide, few, 3, 0.1).double().requires_grad_()
    (F.cross_entropy(wide.double() @ found[:-1] + found[-1], few) + 0.05 * found[:-1].square().sum()).backward()
    assert found.grad.abs().max() < 1e-4
    chosen = torch.tensor([5, 0, 59])
    assert torch.equal(evaluation.rows(sparse, chosen).to_dense(), x[chosen])


def test_nearest_neighbours_vote_as_a_loop_does():
    torch.manual_seed(1)
    features, labels, queries = torch.randn(30, 4), torch.randint(0, 3, (30,)), torch.randn(11, 4)
    centre, right = features.mean(0), 0
    answers = torch.randint(0, 3, (11,))
    for query, answer in zip(queries, answers):
        cosine = [float(F.cosine_similarity(query - centre, f - centre, dim=0)) for f in features]
        nearest = sorted(range(30), key=lambda i: -cosine[i])[:5]
        votes = [sum(np.exp(cosine[i] / 0.07) for i in nearest if labels[i] == c) for c in range(3)]
        right += int(np.argmax(votes)) == int(answer)
    assert evaluation.knn_accuracy(features, labels, queries, answers, k=5) == pytest.approx(100 * right / 11)


def test_the_probe_is_fitted_on_all_the_labels_that_it_was_given():
    torch.manual_seed(0)
    x, labels = torch.randn(50, 6), np.arange(50) % 2
    weights, strength = evaluation.probe(x, labels, 2, (1, 0.1))
    torch.testing.assert_close(weights, evaluation.logistic_regression(x, labels, 2, strength), atol=1e-3, rtol=1e-3)


def test_cross_validation_takes_a_strong_penalty_for_noise_and_a_weak_one_for_signal():
    torch.manual_seed(0)
    labels = np.arange(60) % 2
    noise, signal = torch.randn(60, 40), torch.randn(60, 40)
    signal[:, 0] += 8 * torch.from_numpy(labels)
    assert evaluation.probe(noise, labels, 2, finetuning.PROBE_STRENGTHS)[1] == max(finetuning.PROBE_STRENGTHS)
    assert evaluation.probe(signal, labels, 2, finetuning.PROBE_STRENGTHS)[1] < 0.3


@pytest.mark.parametrize("most", [0, 1, 50, 10**6])
def test_words_and_pairs_are_counted_as_a_loop_does_in_any_number_of_slices(corpus, tmp_path, most, monkeypatch):
    monkeypatch.setattr(datasets.Texts, "slices", lambda self, size: np.array_split(np.arange(len(self)), 7))
    texts, V = documents.load_texts(str(corpus), tmp_path, 300), 300
    pairs = datasets.frequent_pairs(texts, most, least=1).tolist()
    found = evaluation.term_counts(texts, np.array(pairs, np.int64)).to_dense()
    assert found.shape == (len(texts), V + len(pairs)) and len(pairs) <= most
    for i in range(0, len(texts), 40):
        tokens = texts[i].tolist()
        neighbours = [a * V + b for a, b in zip(tokens, tokens[1:])]
        assert found[i].tolist() == [tokens.count(t) for t in range(V)] + [neighbours.count(p) for p in pairs]


def test_tf_idf_is_the_textbook_formula():
    counts = torch.tensor([[2.0, 0, 1], [0, 3, 1], [1, 0, 0]])
    owner, term = counts.nonzero(as_tuple=True)
    sparse = evaluation.csr(F.pad(torch.bincount(owner, minlength=3).cumsum(0), (1, 0)), term, counts[owner, term],
                            counts.shape)
    found = evaluation.tf_idf(sparse, np.array([0, 1])).to_dense()
    for i in range(3):
        row = [0.0 if counts[i, j] == 0 else
               (1 + np.log(float(counts[i, j]))) * (np.log(3 / (1 + int((counts[:2, j] > 0).sum()))) + 1)
               for j in range(3)]
        np.testing.assert_allclose(found[i], np.array(row) / np.linalg.norm(row), rtol=1e-5)
