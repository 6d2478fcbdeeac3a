package frontend

import (
	"errors"
	"time"

	"github.com/reseal/reseal/edge/exchange"
)

// tunnel passes on the bytes of a client whose listener has protocol tls. The
// connection is one request.
type tunnel struct{ serial }

// uploadMark is at how many bytes of held nothing more is read: a read brings 16 KiB
// at most.
const uploadMark = exchange.UploadWindow - 16<<10

var errCut = errors.New("the client ended the connection without close_notify")

// open implements driver. Nothing is read before the backend's connection is there.
func (t *tunnel) open() {
	t.client.setActive(true)
	t.client.conn.Pause()
	t.request = t.client.newRequest(t)
	t.request.connect()
}

// read implements driver.
func (t *tunnel) read(p []byte) {
	if t.request == nil {
		return
	}
	if t.held += len(p); t.held >= uploadMark {
		t.client.conn.Pause()
	}
	t.request.body(p, false)
}

// peerEnded implements driver.
func (t *tunnel) peerEnded(notified bool) {
	switch {
	case t.request == nil:
	case notified:
		t.request.bodyEnd(nil)
	default:
		t.lost(errCut)
	}
}

// look implements driver.
func (t *tunnel) look(now time.Duration) time.Duration {
	if t.request == nil {
		return never
	}
	return t.lookAt(now)
}

// leave implements driver. A tunnel ends when its ends say so.
func (t *tunnel) leave() {}

// informational implements stream.
func (t *tunnel) informational(*exchange.Response) {}

// respond implements stream: the backend's connection is there.
func (t *tunnel) respond(*exchange.Response, bool) error {
	t.client.remind(t.client.settings().idle)
	t.client.conn.Resume()
	return nil
}

// data implements stream.
func (t *tunnel) data(p []byte, end bool) error {
	t.wrote(len(p), t.client.conn.Write(p))
	if end {
		t.client.conn.CloseWrite()
	}
	return nil
}

// end implements stream.
func (t *tunnel) end(exchange.Fields) error {
	t.client.conn.CloseWrite()
	return nil
}

// accept implements stream.
func (t *tunnel) accept(n int) {
	before := t.held
	if t.held -= n; before >= uploadMark && t.held < uploadMark {
		t.client.conn.Resume()
	}
}

// cut implements stream.
func (t *tunnel) cut() {
	switch q := t.request; {
	case q.tunnel && q.reason != "timeout_idle", q.reason == "internal":
		t.client.conn.Abort()
	default:
		t.client.close()
	}
}

// over implements stream.
func (t *tunnel) over() {
	t.request = nil
	t.client.close()
}
