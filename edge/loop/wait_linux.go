package loop

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// holdTime is for how many milliseconds a loop that waits keeps its processor: it makes
// the system call without telling Go's scheduler (RawSyscall), so that a wait is that
// call and no more. A loop that serves anything waits shorter than this. Go's garbage
// collector need not wait for as long: the signal by which it asks a goroutine to stop
// ends the call.
const holdTime = 4

// wakeUp stands for the eventfd in what epoll_wait returns.
const wakeUp = -1

func newWaiter(cfg Config) (waiter, error) {
	if cfg.Goroutines {
		return newChannel(), nil
	}
	return newEpoll()
}

// newSource takes the descriptor of a socket, which leaves Go's own poller: else
// both would be woken by each packet.
func newSource(g *Group, conn net.Conn) (source, error) {
	var sc syscall.Conn
	switch conn := conn.(type) {
	case *net.TCPConn:
		sc = conn
	case *net.UnixConn:
		sc = conn
	}
	if sc == nil || g.cfg.Goroutines {
		return newPump(g, conn), nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	controlErr := raw.Control(func(old uintptr) {
		fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0)
	})
	if err = errors.Join(controlErr, err); err != nil {
		return nil, fmt.Errorf("take over a connection from %v: %w", conn.RemoteAddr(), err)
	}
	_ = conn.Close() // the other descriptor, and its place in Go's poller
	return &socket{fd: fd}, nil
}

// epoll waits for the sockets of one loop, edge-triggered: a socket is added once,
// and after that there are only waits, reads and writes.
type epoll struct {
	fd     int
	hold   int // holdTime, but in tests
	events [256]unix.EpollEvent
	n      int // of events
	rest   *rest

	// places are what events name, with the generation of the place: an event of a
	// socket that was closed in the same round is not its successor's.
	places []place
	free   []int32

	mu     sync.Mutex // guards event against close
	event  int        // eventfd; -1 after close
	counts counts
}

type place struct {
	generation int32
	socket     *socket
}

// counts are system calls, for tests.
type counts struct {
	waits, reads, writes, controls int
}

func newEpoll() (*epoll, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("eventfd", err)
	}
	// A new edge comes with each write, so nobody needs to read it.
	wake := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: wakeUp}
	e := &epoll{fd: fd, hold: holdTime, event: event}
	err = unix.EpollCtl(fd, unix.EPOLL_CTL_ADD, event, &wake)
	if err == nil {
		e.rest, err = newRest(fd, func() bool { e.fetch(0); return e.n > 0 })
	}
	if err != nil {
		_, _ = unix.Close(event), unix.Close(fd)
		return nil, os.NewSyscallError("epoll_ctl", err)
	}
	keepProcessor()
	return e, nil
}

func (e *epoll) wait(l *Loop, until time.Duration) {
	timeout := milliseconds(l, until)
	if timeout >= 0 && timeout <= e.hold {
		e.fetch(timeout)
	} else if e.fetch(e.hold) {
		e.rest.until(l, until)
	}
	for i := range e.events[:e.n] {
		e.tell(l, &e.events[i])
	}
}

// milliseconds is until when to wait, as epoll_pwait takes it.
func milliseconds(l *Loop, until time.Duration) int {
	if until <= 0 {
		return int(until)
	}
	left := until - time.Since(l.start)
	return int(max(left+time.Millisecond-1, 0) / time.Millisecond)
}

// fetch fetches what is ready, and waits for it while the loop keeps its processor. It
// reports whether the time has passed without anything.
func (e *epoll) fetch(timeout int) (passed bool) {
	e.counts.waits++
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(e.fd),
		uintptr(unsafe.Pointer(&e.events[0])), uintptr(len(e.events)), uintptr(timeout), 0, 0)
	e.n = 0
	if errno == 0 { // else a signal has ended it
		e.n = int(n)
	}
	return errno == 0 && n == 0
}

// tell tells a connection what its socket is ready for.
func (e *epoll) tell(l *Loop, event *unix.EpollEvent) {
	if event.Fd == wakeUp {
		return
	}
	at := &e.places[event.Fd]
	if at.generation != event.Pad || at.socket == nil {
		return
	}
	const ends = unix.EPOLLRDHUP | unix.EPOLLHUP | unix.EPOLLERR
	c := at.socket.conn
	if event.Events&ends != 0 {
		at.socket.ends = true
	}
	if event.Events&(unix.EPOLLIN|ends) != 0 {
		c.readable = true
		l.enlist(c)
	}
	if event.Events&(unix.EPOLLOUT|ends) != 0 {
		c.writable()
	}
}

func (e *epoll) wake() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.event >= 0 {
		one := [8]byte{1}
		_, _, _ = unix.RawSyscall(unix.SYS_WRITE, uintptr(e.event), uintptr(unsafe.Pointer(&one)), 8)
	}
}

func (e *epoll) close() {
	e.mu.Lock()
	_, _, _ = unix.Close(e.event), unix.Close(e.fd), e.rest.file.Close()
	e.event = -1
	e.mu.Unlock()
	freeProcessor()
}

// socket is a descriptor on a loop.
type socket struct {
	fd    int
	epoll *epoll // nil while detached
	place int32
	conn  *Conn
	ends  bool // FIN or an error has come: read on until it shows
}

func (s *socket) attach(c *Conn) error {
	e := c.loop.waiter.(*epoll)
	if len(e.free) == 0 {
		e.places = append(e.places, place{})
		e.free = append(e.free, int32(len(e.places)-1))
	}
	last := len(e.free) - 1
	at := e.free[last]
	e.counts.controls++
	event := unix.EpollEvent{
		Events: unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLET,
		Fd:     at, Pad: e.places[at].generation,
	}
	if err := unix.EpollCtl(e.fd, unix.EPOLL_CTL_ADD, s.fd, &event); err != nil {
		return os.NewSyscallError("epoll_ctl", err)
	}
	e.free = e.free[:last]
	e.places[at].socket = s
	s.epoll, s.place, s.conn = e, at, c
	return nil
}

func (s *socket) detach() {
	s.epoll.counts.controls++
	_ = unix.EpollCtl(s.epoll.fd, unix.EPOLL_CTL_DEL, s.fd, nil) // it is there
	s.leave()
}

// leave gives the place free. Events that were fetched before name an earlier
// generation.
func (s *socket) leave() {
	if s.epoll == nil {
		return
	}
	at := &s.epoll.places[s.place]
	at.generation++
	at.socket = nil
	s.epoll.free = append(s.epoll.free, s.place)
	s.epoll = nil
}

func (s *socket) read(p []byte) (int, error) {
	for read := 0; ; {
		s.epoll.counts.reads++
		n, errno := callRead(s.fd, p[read:])
		switch {
		case errno == unix.EINTR:
		case errno == unix.EAGAIN:
			return read, nil
		case errno != 0:
			return read, os.NewSyscallError("read", errno)
		case n == 0:
			return read, io.EOF
		default:
			read += n
			if read == len(p) || !s.ends {
				return read, nil
			}
		}
	}
}

func (s *socket) write(p []byte) (int, error) {
	for {
		s.epoll.counts.writes++
		n, errno := callWrite(s.fd, p)
		switch errno {
		case 0:
			return n, nil
		case unix.EINTR:
		case unix.EAGAIN:
			return 0, nil
		default:
			return 0, os.NewSyscallError("write", errno)
		}
	}
}

func (s *socket) busy() bool { return false }

func (s *socket) shutdown() {
	_ = unix.Shutdown(s.fd, unix.SHUT_WR) // fails only when the peer is gone
}

func (s *socket) close(reset bool) {
	if reset {
		_ = unix.SetsockoptLinger(s.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	}
	s.leave()
	_ = unix.Close(s.fd) // which takes it out of the epoll, too
}
