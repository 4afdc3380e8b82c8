"""The store in a world in which everything is drawn from one seed: time, disk, network, and who dies when.

    world.py     time, and who comes next
    disk.py      a ledger and segments that forget, tear, flip, fill up and fail to sync
    network.py   a broker that dies and comes back, and calls to it that are lost, delayed and repeated
    book.py      what was promised to whom, kept apart from the store
    actors.py    producers, workers, a learner and an operator
    run.py       one life from one seed

The table, the broker, the account of segments and the clients (`Store`, `RemoteControl`) are the real ones.
"""
