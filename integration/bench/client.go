package bench

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"

	"github.com/reseal/reseal/integration/peers"
)

const (
	// requestTimeout bounds one request, its retries included.
	requestTimeout = 30 * time.Second
	// retryPause is how long a client waits before it tries again what a proxy
	// or backend refused.
	retryPause = 10 * time.Millisecond
	// abortAfter is how much of a body a client reads before it goes away.
	abortAfter = 1 << 10
	// abortWindow is the receive buffer of a client that will abort, and
	// abortSegment the size of its segments, as on an Ethernet. With those of
	// the loopback interface the kernels on both sides would hold the whole
	// response, and the proxy would be done with it before it notices.
	abortWindow  = 16 << 10
	abortSegment = 1448
)

// client is one HTTP/1.1 client with at most one connection. It is used by one
// goroutine.
type client struct {
	load *Load
	host string

	conn   *tls.Conn
	reader *bufio.Reader
	fresh  bool // no request was made on conn yet
	body   []byte
	wire   string // the request
}

func newClient(load *Load, index int) *client {
	c := &client{load: load, host: load.Hosts[index%len(load.Hosts)]}
	c.wire = fmt.Sprintf("GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: reseal-bench\r\n\r\n", load.Path, c.host)
	c.body = make([]byte, len(peers.Body(load.Path))+1)
	return c
}

// unstartedError is a failure before any byte of a request was sent.
type unstartedError struct{ error }

func (e unstartedError) Unwrap() error { return e.error }

// staleError is a kept connection that ended before a byte of the response.
type staleError struct{ error }

func (e staleError) Unwrap() error { return e.error }

// statusError is an answer other than 200.
type statusError struct {
	code int
	text string
}

func (e statusError) Error() string { return fmt.Sprintf("status %d: %s", e.code, e.text) }

// smallWindow makes a socket that can't hold a whole response.
func smallWindow(_, _ string, raw syscall.RawConn) error {
	var failed error
	err := raw.Control(func(fd uintptr) {
		failed = errors.Join(
			syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, abortWindow),
			syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_MAXSEG, abortSegment))
	})
	return errors.Join(err, failed)
}

// connect makes sure that there is a connection. One for an abort is new, and
// takes so little at a time that the proxy notices.
func (c *client) connect(ctx context.Context, abort bool) error {
	if abort {
		c.close()
	}
	if c.conn != nil {
		return nil
	}
	dialer := net.Dialer{Timeout: requestTimeout}
	if abort {
		dialer.Control = smallWindow
	}
	socket, err := dialer.DialContext(ctx, "tcp", c.load.Address)
	if err != nil {
		return unstartedError{err}
	}
	config := c.load.TLS.Clone()
	config.ServerName = c.host
	conn := tls.Client(socket, config)
	_ = conn.SetDeadline(time.Now().Add(requestTimeout))
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = socket.Close()
		return unstartedError{err}
	}
	c.conn, c.fresh = conn, true
	if c.reader == nil {
		c.reader = bufio.NewReaderSize(conn, 32<<10)
	}
	c.reader.Reset(conn)
	return nil
}

// drop ends the connection as clients that go away do: the socket is closed,
// whatever is on its way.
func (c *client) drop() {
	if c.conn != nil {
		_ = c.conn.NetConn().Close()
		c.conn = nil
	}
}

// close ends the connection cleanly.
func (c *client) close() {
	if c.conn != nil {
		_ = c.conn.Close()
		c.conn = nil
	}
}

// get makes one request and checks the response. With abort it goes away in the
// middle of the body.
func (c *client) get(ctx context.Context, abort bool) error {
	if err := c.connect(ctx, abort); err != nil {
		return err
	}
	kept := !c.fresh
	c.fresh = false
	_ = c.conn.SetDeadline(time.Now().Add(requestTimeout))
	_, err := io.WriteString(c.conn, c.wire)
	if err == nil {
		_, err = c.reader.Peek(1)
	}
	if err != nil {
		c.drop()
		if kept && !errors.Is(err, syscall.ETIMEDOUT) {
			return staleError{err}
		}
		return err
	}
	response, err := http.ReadResponse(c.reader, nil)
	if err != nil {
		c.drop()
		return err
	}
	if abort && response.StatusCode == http.StatusOK {
		_, err := io.CopyN(io.Discard, response.Body, abortAfter)
		c.drop()
		return err
	}
	return c.finish(response)
}

// finish reads the response and compares it with what it should be.
func (c *client) finish(response *http.Response) error {
	n, err := io.ReadFull(response.Body, c.body)
	if errors.Is(err, io.ErrUnexpectedEOF) && int64(n) == response.ContentLength || errors.Is(err, io.EOF) {
		err = nil // the buffer is a byte longer than the body
	}
	if err != nil {
		c.drop()
		return fmt.Errorf("after %d bytes: %w", n, err)
	}
	if response.Close {
		c.close()
	}
	if response.StatusCode != http.StatusOK {
		text := c.body[:min(n, 100)]
		if n == len(c.body) {
			c.drop() // the rest of it was not read
		}
		return statusError{response.StatusCode, strings.TrimSpace(string(text))}
	}
	if want := peers.Body(c.load.Path); !bytes.Equal(c.body[:n], want) {
		return fmt.Errorf("%d bytes, not the %d that were expected", n, len(want))
	}
	return nil
}
