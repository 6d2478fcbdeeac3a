package frontend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/reseal/reseal/edge/exchange"
)

// statusClientClosed is logged for requests that the client gave up. It is never
// sent. nginx made the number common.
const statusClientClosed = 499

// refuse answers a request that fails on this leg.
func (q *request) refuse(status int, reason string) {
	q.handler.generation.slot.counters.Error(reason)
	q.fail(status, reason)
}

// fail answers with an error. The body is short, plain text.
func (q *request) fail(status int, reason string) {
	q.status, q.reason = status, reason
	header := q.w.Header()
	header.Set("Content-Type", "text/plain; charset=utf-8")
	header.Set("Cache-Control", "no-store")
	header.Set(ReasonHeader, reason)
	q.sayGoodbye()
	text := fmt.Sprintf("%d %s: %s\n", status, http.StatusText(status), reason)
	header.Set("Content-Length", fmt.Sprint(len(text)))
	q.w.WriteHeader(status)
	if q.r.Method != http.MethodHead {
		n, _ := io.WriteString(q.w, text) // the client may be gone
		q.sent = int64(n)
	}
}

// abort ends the response so that the client sees that it is cut short.
func (q *request) abort(status int, reason string, err error) {
	if q.status == 0 || status == statusClientClosed {
		q.status = status
	}
	q.reason, q.err, q.aborting = reason, err, true
}

// sayGoodbye asks the client to leave when it should. HTTP/2 sends GOAWAY
// instead of the header field.
func (q *request) sayGoodbye() {
	if q.handler.generation.leaving.Load() || q.client.refused || q.client.leaving.Load() {
		q.w.Header().Set("Connection", "close")
	}
}

// upstreamFailed answers after an error of the upstream, before any byte of a
// response.
func (q *request) upstreamFailed(err error) {
	status, reason := q.blame(err)
	q.err = err
	if status == statusClientClosed {
		q.abort(status, reason, err)
		return
	}
	q.fail(status, reason)
}

// blame finds out who ended a request and why.
func (q *request) blame(err error) (status int, reason string) {
	var known interface {
		HTTPStatus() (code int, reason string)
	}
	switch cause := context.Cause(q.ctx); {
	case errors.Is(cause, errRequestTimeout):
		return http.StatusGatewayTimeout, "timeout_request"
	case q.client.guard.isBroken():
		closeAfterAnswer(q.w)
		return http.StatusBadRequest, "bad_request"
	case q.client.aborted.Load():
		return http.StatusServiceUnavailable, "drain_timeout"
	case errors.Is(cause, errClientStalled), q.client.stalled.Load():
		return statusClientClosed, "client_stalled"
	case errors.Is(cause, errBodyStalled):
		return http.StatusRequestTimeout, "timeout_body"
	case cause != nil || q.body.failed():
		return statusClientClosed, "client_abort"
	case errors.As(err, &known):
		return known.HTTPStatus()
	default:
		return http.StatusBadGateway, "upstream_error"
	}
}

// answer passes a response on.
func (q *request) answer(response *http.Response) {
	header := q.w.Header()
	copyHeader(header, response.Header)
	removeHopByHop(header)
	exchange.FilterTrailer(response.Trailer)
	announced := trailerNames(response.Trailer)
	if len(announced) > 0 {
		header.Set("Trailer", strings.Join(announced, ", "))
		if q.r.ProtoMajor == 1 && q.r.Method != http.MethodHead {
			header.Del("Content-Length") // HTTP/1.1 has trailers only after chunks
		}
	}
	edit(header, q.match.ResponseHeaders)
	if _, ok := header["Content-Type"]; !ok {
		header["Content-Type"] = nil // keeps net/http from guessing one
	}
	if q.r.ProtoMajor == 1 {
		asWritten(header, q.x.ResponseNames)
	}
	q.sayGoodbye()
	q.status = response.StatusCode
	q.w.WriteHeader(response.StatusCode)
	if !q.copyBody(response) {
		return
	}
	if len(response.Trailer) > 0 {
		q.sendTrailers(response.Trailer, announced)
	}
}

// sendTrailers sets trailers, of which the header has announced some.
func (q *request) sendTrailers(trailer http.Header, announced []string) {
	_ = q.control.Flush() // without it a short HTTP/1.1 response would have no chunks
	exchange.FilterTrailer(trailer)
	known := map[string]bool{}
	for _, name := range announced {
		known[name] = true
	}
	for name, values := range trailer {
		if !known[name] {
			name = http.TrailerPrefix + name
		}
		q.w.Header()[name] = values
	}
}

// copyBody passes the response's body on and flushes whenever the backend may
// pause, so that streams flow. It reports false when the response was cut.
func (q *request) copyBody(response *http.Response) bool {
	if q.r.Method == http.MethodHead || response.StatusCode == http.StatusNoContent || response.StatusCode == http.StatusNotModified {
		return true
	}
	if response.ContentLength < 0 && q.control.Flush() != nil {
		q.writeFailed(errors.New("the header could not be written"))
		return false
	}
	guard := newStallGuard(q.handler.generation.settings.idle, q.stalled)
	defer guard.stop()
	buffer := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buffer)
	for {
		n, err := response.Body.Read(buffer[:])
		if n > 0 {
			guard.begin()
			written, writeErr := q.w.Write(buffer[:n])
			q.sent += int64(written)
			if writeErr == nil && q.sent != response.ContentLength {
				writeErr = q.control.Flush()
			}
			guard.end()
			if written > 0 {
				q.client.taken.Store(time.Now().UnixNano())
			}
			if writeErr != nil {
				q.writeFailed(writeErr)
				return false
			}
		}
		switch {
		case errors.Is(err, io.EOF) && response.ContentLength >= 0 && q.sent != response.ContentLength:
			err = io.ErrUnexpectedEOF
			fallthrough
		case err != nil && !errors.Is(err, io.EOF):
			status, reason := q.blame(err)
			q.abort(status, reason, err)
			return false
		case err != nil:
			return true
		}
	}
}

// stalled ends the request of a client that takes nothing.
func (q *request) stalled() {
	idle := q.handler.generation.settings.idle
	if time.Since(time.Unix(0, q.client.taken.Load())) >= idle {
		// It takes nothing of any answer: more streams would go the same way.
		q.client.stalled.Store(true)
	}
	q.cancel(errClientStalled)
	if q.client.stalled.Load() {
		_ = q.client.Close() // without close_notify, which it would not take either
		return
	}
	_ = q.control.SetWriteDeadline(q.started) // in the past: ends the write
}

// writeFailed is the end of a request whose client took no more.
func (q *request) writeFailed(err error) {
	status, reason := q.blame(err)
	switch {
	case reason != "upstream_error":
	case errors.Is(err, os.ErrDeadlineExceeded):
		status, reason = statusClientClosed, "client_stalled"
	default:
		status, reason = statusClientClosed, "client_abort"
	}
	q.abort(status, reason, err)
}
