package frontend

import (
	"crypto/rand"
	"crypto/sha1" // #nosec G505 -- what RFC 6455 section 4.2.2 asks for; it protects nothing
	"encoding/base64"
	"errors"
	"net/http"
	"strings"

	"github.com/reseal/reseal/edge/exchange"
)

// http2Tunnel is what is special about a stream that is to become a tunnel (RFC
// 8441). Behind the frontend the request is what HTTP/1.1 has for it, GET with
// Upgrade, and its answer 101.
type http2Tunnel struct {
	asked  bool
	open   bool
	accept string // the Sec-WebSocket-Accept that has to come; "": none
	early  []byte // came before the answer; a window of the stream at most
}

var (
	errNotSwitched = errors.New("the backend answers a request for a tunnel with success, but without 101")
	errNotAccepted = errors.New("the Sec-WebSocket-Accept of the backend is not the one for our key (RFC 6455 section 4.1)")
)

// upgrade makes of the request one of HTTP/1.1. WebSockets have a key there, which
// is no part of an extended CONNECT (RFC 8441 section 5.1).
func (s *http2Stream) upgrade() {
	s.tunnel.asked = true
	s.head.Method, s.head.Length = http.MethodGet, 0
	if !strings.EqualFold(s.head.Protocol, "websocket") {
		return
	}
	nonce := make([]byte, 16)
	_, _ = rand.Read(nonce) // never fails
	key := base64.StdEncoding.EncodeToString(nonce)
	s.head.Fields.Set("sec-websocket-key", key)
	digest := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11")) // #nosec G401
	s.tunnel.accept = base64.StdEncoding.EncodeToString(digest[:])
}

// waits reports whether the answer is still to come.
func (t *http2Tunnel) waits() bool { return t.asked && !t.open }

// check refuses an answer that the client would take for a tunnel, or for one of
// another protocol, though it is not, and takes from it what is HTTP/1.1's.
func (t *http2Tunnel) check(r *exchange.Response) error {
	switch {
	case !t.asked:
	case r.Status >= 200 && r.Status < 300:
		return errNotSwitched
	case r.Status == http.StatusSwitchingProtocols && t.accept != "":
		if r.Version != exchange.HTTP2 && r.Fields.Get("Sec-WebSocket-Accept") != t.accept {
			return errNotAccepted
		}
		r.Fields.Del("Sec-WebSocket-Accept")
	}
	return nil
}

// opened passes on what came before the answer, in a moment.
func (s *http2Stream) opened() {
	if len(s.tunnel.early) == 0 && !s.whole {
		s.tunnel.open = true
		return
	}
	d, id := s.driver, s.id
	d.client.conn.Loop().Post(func() {
		if s := d.find(id); s != nil {
			early := s.tunnel.early
			s.tunnel.open, s.tunnel.early = true, nil
			s.request.body(early, s.whole)
		}
	})
}
