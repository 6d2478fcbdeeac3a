package loop

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Waits are made without telling the scheduler (RawSyscall), as reads and writes
// are: none of them blocks.

// wakeUp stands for the eventfd in what epoll_wait returns.
const wakeUp = -1

// rounds are how many rounds in a row a busy loop may begin before it lets other
// goroutines of its processor run, handshakes among them.
const rounds = 4

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
// and after that there are only waits, reads and writes. The descriptor of the
// epoll itself is in Go's poller, so that a loop that waits blocks a goroutine and
// no thread.
type epoll struct {
	fd     int
	file   *os.File
	raw    syscall.RawConn
	until  time.Duration // of the deadline that file has
	poll   func(uintptr) bool
	events [256]unix.EpollEvent
	n      int
	looks  int // in this wait
	busy   int // rounds in a row that did not wait

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
	err = errors.Join(unix.SetNonblock(fd, true), unix.EpollCtl(fd, unix.EPOLL_CTL_ADD, event, &wake))
	e := &epoll{fd: fd, event: event, until: -1, file: os.NewFile(uintptr(fd), "epoll")}
	if err == nil {
		e.raw, err = e.file.SyscallConn()
	}
	if err == nil {
		err = e.file.SetReadDeadline(time.Time{}) // fails when Go can't wait for it
	}
	if err != nil {
		e.close()
		return nil, err
	}
	e.poll = func(uintptr) bool { return e.look() }
	return e, nil
}

// look fetches what is ready, and does not wait for it.
func (e *epoll) look() bool {
	e.looks++
	e.counts.waits++
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(e.fd),
		uintptr(unsafe.Pointer(&e.events[0])), uintptr(len(e.events)), 0, 0, 0)
	e.n = 0
	if errno == 0 {
		e.n = int(n)
	}
	return e.n > 0
}

func (e *epoll) wait(l *Loop, until time.Duration) {
	e.looks = 0
	if until == 0 {
		e.look()
	} else {
		e.park(l, until)
	}
	if e.looks > 1 {
		e.busy = 0
	} else if e.busy++; e.busy >= rounds {
		e.busy = 0
		runtime.Gosched()
	}
	for i := range e.events[:e.n] {
		e.tell(l, &e.events[i])
	}
}

// park looks, and waits in Go's poller when there is nothing.
func (e *epoll) park(l *Loop, until time.Duration) {
	if until != e.until {
		var at time.Time
		if until > 0 {
			at = l.start.Add(until)
		}
		_ = e.file.SetReadDeadline(at) // was tried by newEpoll
		e.until = until
	}
	if e.raw.Read(e.poll) != nil { // the time has come
		e.look()
	}
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
	defer e.mu.Unlock()
	_ = unix.Close(e.event)
	e.event = -1
	_ = e.file.Close()
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
