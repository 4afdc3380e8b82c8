"""`make bench`: all benchmarks, one after the other."""

from benchmarks import learner

learner.main()
