"""The search in bf16 gives what float64 does, also where rows are as near to each other as bf16 can tell."""

import pytest
import torch
from torch.nn import functional as F

from simclr_fast.nearest import nearest

module = pytest.importorskip("simclr_fast.nearest_bf16", reason="needs numba")


def made(kind, n, d, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    if kind == "positive":  # as features behind a ReLU, all alike to some degree
        return x.relu()
    if kind == "crowded":  # all within bf16's rounding of each other
        return 1 + 0.05 * x
    if kind == "repeated":
        return x[torch.randint(n // 4, (n,), generator=generator)]
    return x * 1e4 if kind == "large" else x


def truth(bank, queries, k):
    return (F.normalize(queries.double()) @ F.normalize(bank.double()).T).topk(k)


@pytest.mark.parametrize("kind", ["normal", "positive", "crowded", "repeated", "large"])
@pytest.mark.parametrize(("n", "d", "k"), [(4097, 33, 1), (5000, 128, 20), (6431, 7, 200), (640, 512, 20)])
def test_neighbours_are_those_of_float64(kind, n, d, k):
    bank, queries = made(kind, n, d, 0), made(kind, 530, d, 1)
    values, indices = nearest(bank, queries, k, "bf16")
    expected = truth(bank, queries, k)
    torch.testing.assert_close(values.double(), expected.values, atol=1e-6, rtol=0)  # float32's own error
    given = (F.normalize(queries.double()) @ F.normalize(bank.double()).T).gather(1, indices)
    torch.testing.assert_close(given, expected.values, atol=1e-6, rtol=0)
    assert all(len(set(row)) == k for row in indices.tolist())
    assert (values[:, 1:] <= values[:, :-1]).all()


def test_the_search_is_in_bf16_and_skips_most_rows(monkeypatch):
    bank, queries = made("normal", 5000, 64, 0), made("normal", 40, 64, 1)
    seen = []
    search = module.searched
    monkeypatch.setattr(module, "searched", lambda *arguments: seen.append(1) or search(*arguments))
    nearest(bank, queries, 20, "bf16")
    nearest(bank, queries, 20, "fp32")
    nearest(bank, queries, 5000 // module.GROUP + 1, "bf16")  # too many for groups
    assert len(seen) == 1


@pytest.mark.parametrize("kind", ["normal", "positive", "crowded"])
@pytest.mark.parametrize("d", [1, 33, 512])
def test_no_similarity_is_off_by_more_than_the_bound(kind, d):
    bank, queries = F.normalize(made(kind, 1000, d, 0)), F.normalize(made(kind, 200, d, 1))
    (bank16, moved_bank), (queries16, moved_queries) = module.rounded(bank), module.rounded(queries)
    similar = (queries16 @ bank16.T).double()
    off = (similar - queries.double() @ bank.double().T).abs()
    bound = module.bounds(moved_bank, moved_queries, d)[:, None].double() + similar.abs() * 2.0**-8
    assert (off <= bound).all()
    assert (off / bound).max() > 0.15 or d == 1  # else it is so wide that nothing would be skipped


def test_rows_of_zeros_and_what_is_not_finite():
    bank = made("normal", 5000, 16, 0)
    bank[7] = 0
    values, _ = nearest(bank, torch.zeros(3, 16), 20, "bf16")
    assert values.tolist() == [[0.0] * 20] * 3
    bank[9, 3] = torch.nan
    assert nearest(bank, bank[:2], 5, "bf16")[0].shape == (2, 5)


def test_more_neighbours_than_rows_and_no_queries():
    assert nearest(torch.eye(3), torch.eye(3), 9)[1].shape == (3, 3)
    assert nearest(torch.eye(3), torch.empty(0, 3), 2)[0].shape == (0, 2)
    assert nearest(made("normal", 5000, 8, 0), torch.empty(0, 8), 2, "bf16")[0].shape == (0, 2)


@pytest.mark.parametrize(
    ("bank", "queries", "k", "said"),
    [
        ((0, 3), (2, 3), 1, r"n > 0, got \[0, 3\] and \[2, 3\]"),
        ((4, 3), (2, 5), 1, r"got \[4, 3\] and \[2, 5\]"),
        ((4, 3), (2, 3), 0, "k must be at least 1, got 0"),
    ],
)
def test_bad_input(bank, queries, k, said):
    with pytest.raises(ValueError, match=said):
        nearest(torch.ones(bank), torch.ones(queries), k)


def test_a_precision_that_there_is_not():
    with pytest.raises(ValueError, match="precision must be one of auto, bf16, fp32, got fp16"):
        nearest(torch.ones(4, 3), torch.ones(2, 3), 1, "fp16")


def test_queries_that_ask_for_gradients():
    bank, queries = made("normal", 5000, 16, 0), made("normal", 7, 16, 1).requires_grad_()
    for precision in ("bf16", "fp32"):
        assert not nearest(bank, queries, 5, precision)[0].requires_grad


@pytest.mark.parametrize("rows", [[3], [0, 1, 2, 700]])
def test_queries_like_nothing_and_like_everything_are_left_to_float32(rows, monkeypatch):
    bank, queries = made("normal", 4200, 64, 0), made("normal", 1300, 64, 1)
    queries[rows] = 0
    bank[:1000] = 1 + 1e-3 * bank[:1000]
    queries[1200] = 1
    left, search = [], module._search

    def searched(values, indices, served, *arguments):
        search(values, indices, served, *arguments)
        left.append(int((~served).sum()))

    monkeypatch.setattr(module, "_search", searched)
    values, _ = nearest(bank, queries, 20, "bf16")
    torch.testing.assert_close(values.double(), truth(bank, queries, 20).values, atol=1e-6, rtol=0)
    assert len(rows) + 1 <= sum(left) < 65


def test_a_bank_of_features_all_alike_is_left_to_float32(monkeypatch):
    bank, queries = made("crowded", 5000, 16, 0), made("crowded", 3000, 16, 1)
    seen, search = [], module._search
    monkeypatch.setattr(module, "_search", lambda *arguments: seen.append(len(arguments[0])) or search(*arguments))
    nearest(bank, queries, 20, "bf16")
    assert sum(seen) == module.BLOCK
