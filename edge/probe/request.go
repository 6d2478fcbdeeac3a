package probe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// maxBody bounds what is read of an answer, in bytes.
	maxBody = 4 << 20
	// shortAnswer is what a server has certainly sent before it can be aborted,
	// in bytes.
	shortAnswer = 16 << 10
)

// errNotHTTP is the error of an answer that is not HTTP/1.1.
var errNotHTTP = errors.New("the answer is not HTTP/1.1")

// errLongAnswer is that of an answer that is not read to its end, so that its
// connection is good for nothing but to be aborted.
var errLongAnswer = fmt.Errorf("the answer has more than %d MiB", maxBody>>20)

// ask sends a request and reads the answer's header.
func (l *link) ask(method string) (*http.Response, error) {
	cfg := l.run.cfg
	_ = l.wire.SetDeadline(time.Now().Add(cfg.Timeout))
	path, query, _ := strings.Cut(cfg.Path, "?")
	request := &http.Request{
		Method: method,
		URL:    &url.URL{Path: path, RawPath: path, RawQuery: query},
		Host:   hostHeader(cfg.ServerName, cfg.Address),
		Header: http.Header{"User-Agent": {"reseal-probe"}, "Accept": {"*/*"}},
	}
	if unescaped, err := url.PathUnescape(path); err == nil {
		request.URL.Path = unescaped
	}
	if err := request.Write(l.tc); err != nil {
		return nil, fmt.Errorf("request: %w", err)
	}
	response, err := http.ReadResponse(l.in, request)
	switch {
	case err == nil:
		return response, nil
	case isTimeout(err):
		return nil, fmt.Errorf("no answer to an HTTP request within %s", cfg.Timeout)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return nil, errors.New("the connection was ended in place of an HTTP answer")
	}
	if fin, rst := l.wire.ended(); fin || rst {
		return nil, errors.New("the connection was ended in place of an HTTP answer")
	}
	return nil, errNotHTTP
}

// hostHeader is the Host of a request for name at address.
func hostHeader(name, address string) string {
	_, port, _ := net.SplitHostPort(address)
	if strings.Contains(name, ":") {
		name = "[" + name + "]"
	}
	if port == "443" || port == "" {
		return name
	}
	return name + ":" + port
}

// exchange sends a request and reads the whole answer. kept says whether the
// connection may be used again. With errLongAnswer there is a response too.
func (l *link) exchange(method string) (response *http.Response, kept bool, err error) {
	response, err = l.ask(method)
	if err != nil {
		return nil, false, err
	}
	// Only a body that was read to its end is closed, since Close reads on to it.
	n, err := io.Copy(io.Discard, io.LimitReader(response.Body, maxBody+1))
	if err != nil {
		return nil, false, fmt.Errorf("answer: %w", err)
	}
	l.record.Requests++
	if n > maxBody {
		l.cut = true
		return response, false, errLongAnswer
	}
	response.Body.Close()
	return response, !response.Close, nil
}

// abort sends a request and resets the connection while the answer comes. note
// says what limits the result.
func (l *link) abort() (note string, err error) {
	if buffer, ok := l.wire.Conn.(interface{ SetReadBuffer(bytes int) error }); ok {
		_ = buffer.SetReadBuffer(4096) // so that not all of it is under way at once
	}
	response, err := l.ask(http.MethodGet)
	if err != nil {
		l.end(resealv1.ProbeEnding_PROBE_ENDING_RESET)
		return "", err
	}
	if !l.end(resealv1.ProbeEnding_PROBE_ENDING_ABORT) {
		return "", errCantReset
	}
	if n := response.ContentLength; n >= 0 && n <= shortAnswer {
		note = fmt.Sprintf("the answer has only %d bytes, so all of it was under way; request a longer one to be sure", n)
	}
	return note, nil
}

var errCantReset = errors.New("this kind of connection can't be ended that way")

// keepAlive asks twice on one connection and notes how the server keeps it.
func (l *link) keepAlive() {
	r, facts := l.run, l.run.report.KeepAlive
	response, kept, err := l.exchange(http.MethodGet)
	long := errors.Is(err, errLongAnswer)
	if err != nil && !long {
		r.http = false
		facts.Note = err.Error()
		r.note("no HTTP/1.1 request was answered (%v): only handshakes were tried", err)
		return
	}
	facts.Status = uint32(response.StatusCode)
	facts.Connection = response.Header.Get("Connection")
	facts.KeepAlive = response.Header.Get("Keep-Alive")
	facts.Reusable = resealv1.ProbeAnswer_PROBE_ANSWER_NO
	if framed := response.ContentLength >= 0 || len(response.TransferEncoding) > 0; response.Close && framed && response.ProtoAtLeast(1, 1) {
		facts.Connection = "close" // net/http takes it out of the header
	}
	if long && !response.Close {
		facts.Reusable = resealv1.ProbeAnswer_PROBE_ANSWER_UNSPECIFIED
		facts.Note = err.Error() + "; request a shorter one to see"
		return
	}
	if kept {
		_, _, err := l.exchange(http.MethodHead)
		if err == nil {
			facts.Reusable = resealv1.ProbeAnswer_PROBE_ANSWER_YES
			return
		}
		facts.Note = "a second request was not answered: " + err.Error()
	}
	r.closes = true
}

// probeIdle leaves a session of each version and a connection idle.
func (r *run) probeIdle(ctx context.Context) error {
	if r.cfg.Idle <= 0 {
		return nil
	}
	var waiting []*chain
	for _, c := range r.chains {
		if c.facts.Mechanism == 0 {
			continue
		}
		l, err := r.connect(ctx, c, r.first(), "session to leave idle")
		if err != nil {
			return err
		}
		l.use()
		l.end(resealv1.ProbeEnding_PROBE_ENDING_CLOSE_NOTIFY)
		waiting = append(waiting, c)
	}
	began := time.Now()
	if err := r.idleConnection(ctx); err != nil {
		return err
	}
	rest := time.NewTimer(time.Until(began.Add(r.cfg.Idle)))
	defer rest.Stop()
	select {
	case <-rest.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	for _, c := range waiting {
		if err := r.afterIdle(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

// afterIdle checks whether the session that c was left with lives.
func (r *run) afterIdle(ctx context.Context, c *chain) error {
	l, err := r.connect(ctx, c, r.first(), "after "+r.cfg.Idle.String()+" idle")
	if err != nil {
		return err
	}
	c.survived(resealv1.ProbeEnding_PROBE_ENDING_IDLE, l, r.cfg.Idle.String())
	l.use()
	l.end(resealv1.ProbeEnding_PROBE_ENDING_CLOSE_NOTIFY)
	return nil
}

// idleConnection keeps a connection open for the idle time, unless the server
// ends it first.
func (r *run) idleConnection(ctx context.Context) error {
	if len(r.chains) == 0 || r.closes {
		return nil
	}
	l, err := r.connect(ctx, r.chains[len(r.chains)-1], r.first(), "connection to leave idle")
	if err != nil {
		return err
	}
	l.use()
	began := time.Now()
	facts := r.report.KeepAlive
	_ = l.wire.SetReadDeadline(began.Add(r.cfg.Idle))
	if ctx.Err() == nil {
		_, err = l.in.Peek(1)
		facts.Closed = err != nil && !isTimeout(err)
	}
	if ctx.Err() != nil {
		facts.Closed = false
		l.end(resealv1.ProbeEnding_PROBE_ENDING_RESET)
		return ctx.Err()
	}
	facts.Idle = durationpb.New(time.Since(began).Round(time.Millisecond))
	if facts.Closed {
		l.end(resealv1.ProbeEnding_PROBE_ENDING_PEER)
	} else {
		l.end(resealv1.ProbeEnding_PROBE_ENDING_CLOSE_NOTIFY)
	}
	return nil
}

// use makes a request when the backend takes them, and otherwise lets the
// handshake settle.
func (l *link) use() {
	if l.run.http && !l.run.closes {
		if _, _, err := l.exchange(http.MethodHead); err != nil {
			l.record.Error = err.Error()
		}
		return
	}
	l.settle()
}
