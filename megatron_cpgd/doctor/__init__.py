"""Is this host fit for a run? Works without torch and without a GPU, where it then says so."""
