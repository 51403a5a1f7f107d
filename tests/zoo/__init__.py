"""The zoo: small trainings of the libraries that people use, with and without the monitor.

    make test-zoo                                # install the libraries, run all, write results and page
    python -m tests.zoo --only trl --only peft   # run the tables of these libraries, print the verdicts
    python -m tests.zoo --only "transformers/GPT2*" --details
    python -m tests.zoo.page                     # make docs/compatibility.md from results.json again

A table (``tables/*.py``) lists the configurations of a library, each with the head that is right and with
what is true of its loss. ``session.py`` runs one training,
``verdict.py`` judges it, ``__main__.py`` runs all.
Nothing is downloaded: models are tiny and made from configurations, data is random or generated.
"""
