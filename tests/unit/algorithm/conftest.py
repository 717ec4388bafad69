from hypothesis import settings

# A shared machine can stall any single example for longer than hypothesis' 200 ms.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
