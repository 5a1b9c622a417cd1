"""The names under which the method was published: code written for them runs unchanged."""

from dsp_pruning import GroupWrapper, PruneWrapper
