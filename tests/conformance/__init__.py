"""The conformance kit: each known mistake of two-tower training has a test here that it turns red.

A test names the mistake it is for by `@pytest.mark.trap(number)`. `python -m
experiments.benchmarks.mutations` makes every mistake on purpose and shows which tests see it. (A
package, so that its files may be named as those of other folders.)
"""
