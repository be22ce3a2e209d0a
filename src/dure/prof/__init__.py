"""Looking at what a program does over time: records of an execution, and pictures of them.

:mod:`~dure.prof.records` says what an execution is, whoever observed it; :mod:`~dure.prof.analysis`
where its time went; :mod:`~dure.prof.trace` writes it for Perfetto, :mod:`~dure.prof.page` as one
page for a browser.
"""
