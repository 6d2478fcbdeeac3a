package loop

import (
	"errors"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// rest is how a loop waits for long: in Go's own poller, which costs several system
// calls, but neither a thread nor a processor. A long system call would cost more: each
// has Go's monitor thread look every 20 µs, for a while, whether there are others.
//
// What is in Go's poller is an epoll that watches that of the loop, and it does so while
// the loop rests alone. Else each event of a loop that is awake would wake a thread in
// Go's poller, too.
type rest struct {
	fd    int
	file  *os.File
	raw   syscall.RawConn
	loop  int           // descriptor of the loop's epoll
	alarm time.Duration // of the deadline that file has

	watching bool
	look     func(uintptr) bool // made once
}

// newRest makes a rest. ready fetches events of the loop's epoll, and reports whether
// there are any.
func newRest(loop int, ready func() bool) (*rest, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	err = errors.Join(unix.SetNonblock(fd, true), unix.EpollCtl(fd, unix.EPOLL_CTL_ADD, loop, &unix.EpollEvent{}))
	r := &rest{fd: fd, loop: loop, alarm: -1, file: os.NewFile(uintptr(fd), "epoll")}
	// Go is told of each event from when on the loop's epoll is watched, not always of
	// those before: hence the first look.
	r.look = func(uintptr) bool {
		r.watch(true)
		return ready()
	}
	if err == nil {
		r.raw, err = r.file.SyscallConn()
	}
	if err == nil {
		err = r.file.SetReadDeadline(time.Time{}) // fails when Go can't wait for it
	}
	if err != nil {
		_ = r.file.Close()
		return nil, err
	}
	return r, nil
}

// until returns when something is ready, or at a time since the loop's start; below 0:
// not for that.
func (r *rest) until(l *Loop, until time.Duration) {
	if until != r.alarm {
		var at time.Time
		if until > 0 {
			at = l.start.Add(until)
		}
		_ = r.file.SetReadDeadline(at) // was tried by newRest
		r.alarm = until
	}
	_ = r.raw.Read(r.look) // an error says that the time has come
	r.watch(false)
}

// watch has the loop's epoll watched, or not.
func (r *rest) watch(watching bool) {
	if watching == r.watching {
		return
	}
	r.watching = watching
	var event unix.EpollEvent
	if watching {
		event.Events = unix.EPOLLIN
	}
	_ = unix.EpollCtl(r.fd, unix.EPOLL_CTL_MOD, r.loop, &event) // it is there
}
