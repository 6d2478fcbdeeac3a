package loop

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// fresh is a socket that was accepted and has not joined its loop: a net.Conn for the
// goroutine that makes the handshake. The loop's poller tells it when to go on.
type fresh struct {
	socket        *socket
	loop          *Loop
	local, remote net.Addr
	news          chan struct{} // holds a token after the poller has told something
	timer         *time.Timer   // nil before the first wait with a deadline
	readBy        time.Time
	writeBy       time.Time
	drained       bool // the last read left nothing

	mu   sync.Mutex // no descriptor is closed while it is used
	over bool       // closed, or the loop's
}

func newFresh(to *Loop, fd int, local, remote net.Addr) (*fresh, error) {
	f := &fresh{loop: to, local: local, remote: remote, news: make(chan struct{}, 1)}
	f.socket = &socket{fd: fd, fresh: f}
	if err := to.waiter.(*epoll).add(f.socket, unix.EPOLLIN); err != nil {
		return nil, err
	}
	to.population.Add(1)
	return f, nil
}

// tell is called on the loop when the socket is ready for something.
func (f *fresh) tell() {
	select {
	case f.news <- struct{}{}:
	default: // it is told already
	}
}

// join gives the socket to a loop, and reports false when it is closed.
func (f *fresh) join(to *Loop) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.over {
		return false
	}
	f.over = true
	f.loop.population.Add(-1) // it is counted as any other now
	if to != f.loop {
		_ = f.socket.control(unix.EPOLL_CTL_DEL) // it is there
		f.socket.leave()
	}
	return true
}

// Read implements net.Conn.
func (f *fresh) Read(p []byte) (int, error) {
	for len(p) > 0 {
		select { // what was told before this read is no news after it
		case <-f.news:
		default:
		}
		n, err := f.call(callRead, p)
		f.drained = n < len(p)
		switch {
		case n > 0:
			return n, nil
		case err == nil:
			return 0, io.EOF
		case err == unix.EAGAIN:
			err = f.wait(f.readBy)
		}
		if err != nil && err != unix.EINTR {
			return 0, f.failed("read", err)
		}
	}
	return 0, nil
}

// Write implements net.Conn.
func (f *fresh) Write(p []byte) (written int, err error) {
	for written < len(p) {
		n, err := f.call(callWrite, p[written:])
		written += max(n, 0)
		if err == unix.EAGAIN {
			if err = f.awaitRoom(); err == nil {
				err = f.wait(f.writeBy)
			}
		}
		if err != nil && err != unix.EINTR {
			return written, f.failed("write", err)
		}
	}
	return written, nil
}

// call makes a system call, which does not block.
func (f *fresh) call(how func(int, []byte) (int, syscall.Errno), p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.over {
		return 0, net.ErrClosed
	}
	n, errno := how(f.socket.fd, p)
	if errno != 0 {
		return 0, errno
	}
	return n, nil
}

func (f *fresh) awaitRoom() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.over {
		return net.ErrClosed
	}
	return f.socket.awaitRoom()
}

// wait waits for news.
func (f *fresh) wait(until time.Time) error {
	if until.IsZero() {
		<-f.news
		return nil
	}
	left := time.Until(until)
	if left <= 0 {
		return os.ErrDeadlineExceeded
	}
	if f.timer == nil {
		f.timer = time.NewTimer(left)
	} else {
		f.timer.Reset(left)
	}
	defer f.timer.Stop()
	select {
	case <-f.news:
		return nil
	case <-f.timer.C:
		return os.ErrDeadlineExceeded
	}
}

// failed is an error as package net returns it.
func (f *fresh) failed(op string, err error) error {
	if errno, ok := err.(syscall.Errno); ok {
		err = os.NewSyscallError(op, errno)
	}
	return &net.OpError{Op: op, Net: "tcp", Source: f.local, Addr: f.remote, Err: err}
}

// Close implements net.Conn. Any goroutine may call it.
func (f *fresh) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.over {
		return f.failed("close", net.ErrClosed)
	}
	f.over = true
	f.loop.population.Add(-1)
	f.socket.close(false)
	f.tell() // whoever waits
	return nil
}

// left reports whether the peer has ended TCP and sent nothing else before.
func (f *fresh) left() bool {
	n, err := f.call(peek, make([]byte, 1))
	return n == 0 && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR)
}

// LocalAddr implements net.Conn.
func (f *fresh) LocalAddr() net.Addr { return f.local }

// RemoteAddr implements net.Conn.
func (f *fresh) RemoteAddr() net.Addr { return f.remote }

// SetDeadline implements net.Conn.
func (f *fresh) SetDeadline(t time.Time) error {
	f.readBy, f.writeBy = t, t
	return nil
}

// SetReadDeadline implements net.Conn.
func (f *fresh) SetReadDeadline(t time.Time) error {
	f.readBy = t
	return nil
}

// SetWriteDeadline implements net.Conn.
func (f *fresh) SetWriteDeadline(t time.Time) error {
	f.writeBy = t
	return nil
}

// peek looks at what could be read.
func peek(fd int, p []byte) (int, syscall.Errno) {
	n, _, err := unix.Recvfrom(fd, p, unix.MSG_PEEK|unix.MSG_DONTWAIT)
	errno, _ := err.(syscall.Errno)
	return n, errno
}
