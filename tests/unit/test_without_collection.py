import gc

import pytest

from megatron_cpgd.imports import without_collection


def test_nothing_is_collected_inside_and_what_was_made_there_is_never_looked_at():
    with without_collection():
        assert not gc.isenabled()
        inside = [[]]
    outside = [[]]
    assert gc.isenabled()
    looked_at = {id(each) for each in gc.get_objects()}
    assert id(outside) in looked_at
    assert id(inside) not in looked_at


def test_collections_go_on_after_an_import_that_fails():
    with pytest.raises(ImportError), without_collection():
        raise ImportError
    assert gc.isenabled()
