# cython: language_level=3
"""The log's thread: writes and fsyncs groups without ever taking the GIL.

Owns: the thread, the hand-over of one group at a time and the event that says it is done. Does not own what a group is
(``framing``) nor who waits for it (``arka.storage.disk``).

A Python thread would need the GIL twice for each group commit, and get it, where the loop is busy, after the
interpreter's switch interval: milliseconds around an fsync of a fifth of one, in which the loop has to give way too.
"""

from cpython.ref cimport Py_DECREF, Py_INCREF
from posix.unistd cimport close

import os

from arka._core.framing cimport Group

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <poll.h>
    #include <pthread.h>
    #include <signal.h>
    #include <stdint.h>
    #include <sys/eventfd.h>
    #include <unistd.h>

    /* Signals are for the threads that run Python. */
    static int arka_start_thread(pthread_t *thread, void *(*run)(void *), void *argument) {
        sigset_t all, before;
        int error;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        error = pthread_create(thread, NULL, run, argument);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        if (error == 0) {
            pthread_setname_np(*thread, "arka-log");
        }
        return error;
    }

    static void arka_signal_event(int fd) {
        uint64_t one = 1;
        while (write(fd, &one, sizeof one) < 0 && errno == EINTR) {
        }
    }

    /* Whether there is one already. */
    static int arka_take_event(int fd) {
        uint64_t count;
        ssize_t taken;
        while ((taken = read(fd, &count, sizeof count)) < 0 && errno == EINTR) {
        }
        return taken > 0;
    }

    static void arka_wait_event(int fd) {
        struct pollfd asked = {fd, POLLIN, 0};
        while (!arka_take_event(fd)) {
            poll(&asked, 1, -1);
        }
    }
    """
    ctypedef struct pthread_t:
        pass
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes) noexcept nogil
    int pthread_mutex_destroy(pthread_mutex_t *mutex) noexcept nogil
    int pthread_mutex_lock(pthread_mutex_t *mutex) noexcept nogil
    int pthread_mutex_unlock(pthread_mutex_t *mutex) noexcept nogil
    int pthread_cond_init(pthread_cond_t *condition, void *attributes) noexcept nogil
    int pthread_cond_destroy(pthread_cond_t *condition) noexcept nogil
    int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex) noexcept nogil
    int pthread_cond_signal(pthread_cond_t *condition) noexcept nogil
    int pthread_join(pthread_t thread, void **result) noexcept nogil
    int EFD_CLOEXEC
    int EFD_NONBLOCK
    int arka_start_thread(pthread_t *thread, void *(*run)(void *) noexcept nogil, void *argument) noexcept nogil
    void arka_signal_event(int fd) noexcept nogil
    bint arka_take_event(int fd) noexcept nogil
    void arka_wait_event(int fd) noexcept nogil

cdef struct Desk:
    # What loop and thread share, under its mutex. The desk holds a reference of its own to the group, which the garbage
    # collector knows nothing of: it may clear a LogThread, and a group, that nobody refers to any more.
    pthread_mutex_t mutex
    pthread_cond_t changed
    bint begun
    bint ending
    void *group
    int fd
    int error
    int event_fd


cdef void *serve(void *argument) noexcept nogil:
    cdef Desk *desk = <Desk *> argument
    cdef int error
    pthread_mutex_lock(&desk.mutex)
    while True:
        while not desk.begun and not desk.ending:
            pthread_cond_wait(&desk.changed, &desk.mutex)
        if desk.ending:
            break
        pthread_mutex_unlock(&desk.mutex)
        # SAFETY: group and fd do not change between ``begin`` and ``finish``, and the desk refers to the group.
        error = (<Group> desk.group).commit_nogil(desk.fd)
        pthread_mutex_lock(&desk.mutex)
        desk.error = error
        desk.begun = False
        # Whoever is woken is to find the mutex free.
        pthread_mutex_unlock(&desk.mutex)
        arka_signal_event(desk.event_fd)
        pthread_mutex_lock(&desk.mutex)
    pthread_mutex_unlock(&desk.mutex)
    return NULL


cdef class LogThread:
    """One thread and one group at a time: ``begin``, wait until ``event_fd`` can be read, ``finish`` whatever happened.

    Made and used by one thread; it ends with the object.

    Raises:
        OSError: no thread, or no descriptor, can be had.
    """

    #: Can be read as soon as the group that was begun is done.
    cdef readonly int event_fd
    cdef Desk desk
    cdef pthread_t thread
    #: The process that has the thread: a fork has not.
    cdef int pid

    def __cinit__(self):
        cdef int error
        self.event_fd = -1
        self.pid = 0
        pthread_mutex_init(&self.desk.mutex, NULL)
        pthread_cond_init(&self.desk.changed, NULL)
        self.event_fd = os.eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        self.desk.event_fd = self.event_fd
        error = arka_start_thread(&self.thread, serve, &self.desk)
        if error:
            raise OSError(error, os.strerror(error))
        self.pid = os.getpid()

    def __dealloc__(self):
        if self.pid and self.pid == os.getpid():
            with nogil:
                pthread_mutex_lock(&self.desk.mutex)
                self.desk.ending = True
                pthread_cond_signal(&self.desk.changed)
                pthread_mutex_unlock(&self.desk.mutex)
                pthread_join(self.thread, NULL)
            self.drop_group()
            pthread_cond_destroy(&self.desk.changed)
            pthread_mutex_destroy(&self.desk.mutex)
        if self.event_fd >= 0:
            close(self.event_fd)

    cdef void drop_group(self):
        cdef void *group = self.desk.group
        self.desk.group = NULL
        if group != NULL:
            Py_DECREF(<object> group)

    def begin(self, Group group not None, int fd):
        """Hand a group over: it is sealed, written to ``fd`` at its offset and fsynced.

        Args:
            group: nothing of it may change before ``finish``.
            fd: the segment file, open for writing, and kept open until ``finish``.

        Raises:
            RuntimeError: another group was begun and is not finished.
        """
        if self.desk.group != NULL:
            raise RuntimeError("a group commit is under way: finish it first")
        Py_INCREF(group)
        pthread_mutex_lock(&self.desk.mutex)
        self.desk.group = <void *> group
        self.desk.fd = fd
        self.desk.begun = True
        pthread_mutex_unlock(&self.desk.mutex)
        pthread_cond_signal(&self.desk.changed)

    def finish(self):
        """Take the group back; waits for it, without the GIL, if it is not done yet.

        Raises:
            RuntimeError: none was begun.
            OSError: writing or fsyncing failed; what the file holds is unknown (R6).

        Durability: on return the group is on disk.
        """
        cdef int error
        if self.desk.group == NULL:
            raise RuntimeError("no group commit is under way")
        # The event comes after all else that the thread does with the group.
        if not arka_take_event(self.event_fd):
            with nogil:
                arka_wait_event(self.desk.event_fd)
        pthread_mutex_lock(&self.desk.mutex)
        error = self.desk.error
        pthread_mutex_unlock(&self.desk.mutex)
        self.drop_group()
        if error:
            raise OSError(error, os.strerror(error))
