"""The page allocator: which tag owns which page. Integers only.

A page is free, or owned by one tag (a sequence, or an adapter version) with a positive reference
count. Page 0 is the null page: reads of it are masked and writes to it are padding, so it is never
handed out. A freed page may be handed out at once: the device runs steps in the order they were
enqueued, so work that still reads the page under its old owner ends before work that writes it
under its new one.
"""

from __future__ import annotations

from collections.abc import Iterable

from sloraj.errors import InternalError

NULL_PAGE = 0
NO_OWNER = 0


class PagePool:
    """Allocates the pages 1 .. num_pages - 1. Every operation costs O(1) a page."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise InternalError(f"num_pages: got {num_pages}, allowed: 2 and up (page 0 is null)")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))  # a stack, lowest page on top
        self._owners = [NO_OWNER] * num_pages
        self._references = [0] * num_pages

    @property
    def num_usable(self) -> int:
        """Pages that can have an owner: all but the null page."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    def owner_of(self, page: int) -> int:
        """The tag that owns a page, NO_OWNER if it is free."""
        return self._owners[page]

    def allocate(self, num_pages: int, owner: int) -> list[int] | None:
        """`num_pages` pages for `owner`, or None (and nothing changes) if fewer are free."""
        if owner == NO_OWNER:
            raise InternalError("owner: got 0, allowed: a tag, never 0")
        if num_pages > len(self._free):
            return None
        if num_pages == 0:
            return []
        pages = self._free[: -num_pages - 1 : -1]
        del self._free[-num_pages:]
        for page in pages:
            self._owners[page] = owner
            self._references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add one reference to each page; each needs one more `free` under its owner's tag."""
        pages = list(pages)
        for page in pages:
            if self._references[page] == 0:
                raise InternalError(f"page {page} is free and cannot be shared")
        for page in pages:
            self._references[page] += 1

    def free(self, pages: Iterable[int], owner: int) -> None:
        """Drop one reference of each page; those without any go back to the free list.

        Raises InternalError at the first page that `owner` does not own (freed twice, or
        another's).
        """
        for page in pages:
            if owner == NO_OWNER or self._owners[page] != owner:
                raise InternalError(f"page {page}: freed by {owner}, owned by {self._owners[page]}")
            self._references[page] -= 1
            if self._references[page] == 0:
                self._owners[page] = NO_OWNER
                self._free.append(page)

    def check_integrity(self) -> None:
        """Raise InternalError unless every page but the null one is free or owned, not both."""
        free = set(self._free)
        if len(free) != len(self._free) or NULL_PAGE in free:
            raise InternalError("the free list holds a page twice, or the null page")
        if self._owners[NULL_PAGE] != NO_OWNER or self._references[NULL_PAGE] != 0:
            raise InternalError("the null page has an owner")
        num_owned = 0
        for page in range(NULL_PAGE + 1, self.num_pages):
            owner, references = self._owners[page], self._references[page]
            if (owner != NO_OWNER) != (references > 0) or (page in free) != (owner == NO_OWNER):
                raise InternalError(
                    f"page {page}: owner {owner}, {references} references, free: {page in free}"
                )
            num_owned += owner != NO_OWNER
        if len(free) + num_owned != self.num_usable:
            raise InternalError(f"{len(free)} free + {num_owned} owned != {self.num_usable} pages")
