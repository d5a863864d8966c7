"""Search for spikes in finished series: what `find_spikes.py` and `bench_spikes.py` are made of."""
