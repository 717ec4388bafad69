"""Which process of an engine node takes the weights of which ranks."""

from megatron_cpgd.weight_sync.node_arena import spread


def test_equal_ranks_go_to_the_receivers_by_turns():
    assert spread(dict.fromkeys([0, 1, 8, 9, 16], 7), 2) == [{0: 7, 8: 7, 16: 7}, {1: 7, 9: 7}]


def test_dense_layers_that_every_fourth_rank_sends_are_not_all_for_one_receiver():
    # Four stages of four expert-parallel ranks, the first of which sends the dense layers too.
    elements = {rank: 10 if rank % 4 == 0 else 2 for rank in range(16)}
    groups = spread(elements, 4)
    assert [sum(group.values()) for group in groups] == [16, 16, 16, 16]
    assert sorted(rank for group in groups for rank in group) == list(range(16))
