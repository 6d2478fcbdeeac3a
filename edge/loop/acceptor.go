package loop

import (
	"net"
	"os"
	"syscall"
)

// Acceptor accepts connections that are going to join loops. Where loops wait by
// epoll such a connection is in the poller of its loop from the start, and never in
// Go's, which gives a descriptor up only with a copy of it. A goroutine can make its
// handshake nevertheless, as over any net.Conn.
type Acceptor struct {
	group    *Group
	listener *net.TCPListener
	file     *os.File        // of a copy of the listener's descriptor; nil: there is no epoll
	raw      syscall.RawConn // of file
}

// Acceptor makes an Acceptor on l. Whoever closes l must close the Acceptor, too. The
// options of a connection are those of l: give it TCP_NODELAY.
func (g *Group) Acceptor(l *net.TCPListener) *Acceptor {
	a := &Acceptor{group: g, listener: l}
	a.open()
	return a
}

// Accept waits for a connection and returns it with the loop that it should join; to
// join another costs more. But for Close, one goroutine at a time may use the
// connection. Its deadlines end only what has to wait.
func (a *Acceptor) Accept() (net.Conn, *Loop, error) {
	if a.file != nil && a.group.begun.Load() {
		return a.direct()
	}
	conn, err := a.listener.AcceptTCP()
	if err != nil {
		return nil, nil, err
	}
	return conn, a.group.Next(), nil
}

// Close ends Accept, once l is closed, too.
func (a *Acceptor) Close() {
	if a.file != nil {
		_ = a.file.Close() // fails only when it is closed already
	}
}
