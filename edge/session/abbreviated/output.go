package abbreviated

import (
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// batchSize is how much content one write on the socket carries at most.
const batchSize = 4 * maxPlaintext

// batches are lent while records are sealed and written.
var batches = sync.Pool{New: func() any { return new([]byte) }}

// output is what goes to the peer. Whoever holds mu writes.
type output struct {
	mu         sync.Mutex
	err        error // the first one, which lasts
	protection *protection
	notified   bool // close_notify was sent, or tried
	notifyErr  error

	// Alerts that reading leads to, sent when the socket is free.
	failure  atomic.Pointer[failure]
	failed   atomic.Bool  // the fatal one was sent, or can't be
	refusals atomic.Int32 // no_renegotiation warnings to send
}

// due reports whether alerts wait to be sent.
func (o *output) due() bool {
	return o.refusals.Load() > 0 || o.failure.Load() != nil && !o.failed.Load()
}

var errShutdown = errors.New("tls: close_notify has been sent")

// Write implements net.Conn. It makes as few records of p as can be, and up to
// four of them go out together.
func (c *Conn) Write(p []byte) (int, error) {
	for {
		calls := c.calls.Load()
		if calls&1 != 0 {
			return 0, net.ErrClosed
		}
		if c.calls.CompareAndSwap(calls, calls+2) {
			break
		}
	}
	defer c.calls.Add(-2)
	if err := c.Handshake(); err != nil {
		return 0, err
	}
	defer c.flushAlerts() // those that came up meanwhile
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	return c.writeLocked(p)
}

func (c *Conn) writeLocked(p []byte) (written int, err error) {
	switch {
	case c.out.err != nil:
		return 0, c.out.err
	case c.out.notified:
		return 0, errShutdown
	}
	for len(p) > 0 {
		n := min(len(p), batchSize)
		if err := c.writeRecord(recordApplicationData, p[:n]); err != nil {
			c.out.err = err
			return written, err
		}
		written += n
		p = p[n:]
	}
	return written, nil
}

// writeRecord seals content in as few records as can be and writes them at once.
// Whoever calls holds out.mu.
func (c *Conn) writeRecord(kind byte, content []byte) error {
	lent := batches.Get().(*[]byte)
	defer batches.Put(lent)
	batch, err := c.out.append((*lent)[:0], kind, content)
	*lent = batch
	if err != nil {
		return err
	}
	_, err = c.conn.Write(batch)
	return err
}

// append seals content, if there are keys already, in as few records as can be.
func (o *output) append(batch []byte, kind byte, content []byte) (_ []byte, err error) {
	for len(content) > 0 {
		part := content[:min(len(content), maxPlaintext)]
		content = content[len(part):]
		if o.protection == nil {
			batch = append(appendHeader(batch, kind, len(part)), part...)
			continue
		}
		if batch, err = o.protection.seal(batch, kind, part); err != nil {
			return batch, err
		}
	}
	return batch, nil
}

// notify sends close_notify once.
func (c *Conn) notify() error {
	defer c.flushAlerts()
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	if c.out.notified {
		return c.out.notifyErr
	}
	c.out.notified = true
	c.out.notifyErr = c.out.err
	if c.out.err == nil {
		_ = c.conn.SetWriteDeadline(time.Now().Add(alertTime))
		c.out.notifyErr = c.writeRecord(recordAlert, []byte{levelWarning, byte(alertCloseNotify)})
	}
	return c.out.notifyErr
}
