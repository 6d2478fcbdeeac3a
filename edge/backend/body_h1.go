package backend

import (
	"errors"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// h1Body is the body of a response.
type h1Body struct {
	x *h1Exchange

	mu   sync.Mutex // held during Read
	src  io.ReadCloser
	err  error        // what Read returns from now on
	left atomic.Int64 // -1 is unknown
}

// Read implements io.Reader.
func (b *h1Body) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err != nil {
		return 0, b.err
	}
	if cause := b.x.aborted(); cause != nil {
		b.x.a.done(cause)
		return 0, cause
	}
	dog := b.x.dog.Load()
	dog.wait(1)
	b.x.untaken.Store(0)
	n, err := b.src.Read(p)
	b.x.untaken.Store(time.Now().UnixNano())
	dog.wait(-1)
	if b.left.Load() > 0 {
		b.left.Add(-int64(n))
	}
	switch {
	case err == nil:
		return n, nil
	case err == io.EOF && b.x.aborted() == nil:
		b.err = err
		b.x.settle()
		b.x.partDone()
		return n, err
	}
	b.x.abort(resetError(err, b.x.uploading())) // unless there is a cause already
	b.err = b.x.aborted()
	b.x.a.done(b.err)
	return n, b.err
}

// Close implements io.Closer. A body that was not read to its end costs the
// connection, unless little is left of it.
func (b *h1Body) Close() error {
	b.abandon(errBodyClosed)
	return nil
}

// cheapRest is how much of a body is read, to be thrown away, so that its
// connection lives.
const cheapRest = 64 << 10

// abandon ends the body early.
func (b *h1Body) abandon(cause error) {
	x := b.x
	free := b.mu.TryLock()
	if free {
		over := b.err != nil
		b.mu.Unlock()
		if over {
			return
		}
	}
	cheap := b.left.Load() <= cheapRest && x.keep.Load() && x.parts.Load() == 1
	if !x.cause.CompareAndSwap(nil, &cause) {
		x.a.done(x.aborted())
		return
	}
	x.release()
	x.a.done(cause)
	if !cheap {
		x.c.Close()
		return
	}
	backend := x.c.e.pool.b
	backend.spawn("the rest of an answer", func() {
		if backend.guarded("the rest of an answer", b.drain) != nil {
			x.c.Close()
		}
	})
}

// drain reads the rest, if it comes within closeTimeout, and gives the
// connection back.
func (b *h1Body) drain() {
	c := b.x.c
	if !b.mu.TryLock() {
		c.Interrupt()
		b.mu.Lock()
	}
	defer b.mu.Unlock()
	_ = c.SetReadDeadline(time.Now().Add(c.CloseTimeout()))
	_, err := io.CopyN(io.Discard, b.src, cheapRest+1)
	if !errors.Is(err, io.EOF) || c.Closing() || c.reader.Buffered() > 0 || c.unread {
		c.Close()
		return
	}
	_ = c.SetReadDeadline(time.Time{})
	c.exchange.Store(nil)
	c.freeReader()
	c.e.put(c)
}

// h1Upgraded is the body of a 101 response: a Tunnel.
type h1Upgraded struct {
	x    *h1Exchange
	once sync.Once
}

// upgraded gives the connection to the caller, as a tunnel.
func (x *h1Exchange) upgraded(resp *http.Response) *http.Response {
	x.keep.Store(false)
	x.owed.Store(-1)
	x.watch()
	x.dog.Load().wait(1)
	resp.Body = &h1Upgraded{x: x}
	return resp
}

// Read implements io.Reader.
func (u *h1Upgraded) Read(p []byte) (int, error) {
	n, err := u.x.c.reader.Read(p)
	if cause := u.x.aborted(); err != nil && cause != nil {
		err = cause
	}
	return n, err
}

// Write implements io.Writer.
func (u *h1Upgraded) Write(p []byte) (int, error) {
	n, err := u.x.c.Write(p)
	u.x.touch()
	if cause := u.x.aborted(); err != nil && cause != nil {
		err = cause
	}
	return n, err
}

// CloseWrite sends close_notify.
func (u *h1Upgraded) CloseWrite() error { return u.x.c.TLS.CloseWrite() }

// Close ends the tunnel.
func (u *h1Upgraded) Close() error {
	u.once.Do(func() {
		err := u.x.aborted()
		u.x.abort(errBodyClosed)
		u.x.a.done(err)
	})
	return nil
}
