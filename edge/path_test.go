package edge

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"

	"golang.org/x/net/http2"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// TestTargetAsReceived: the backend gets the target that the client sent, byte
// for byte.
func TestTargetAsReceived(t *testing.T) {
	targets := []string{
		"/", "/a%2Fb", "/a%2Fb|c", "/a%2fb{c}", "/a%2Fb\"c", "/x%3By|z", "/caf%C3%A9", "/caf%c3%a9", "/%61", "/a//b", "//a|b", "/a;b=c?d=%zz&e|f", "/?", "/a?x?y",
	}
	h1 := serveHTTP1(t, func(r *http.Request, _ []byte) string { return ok(r.RequestURI) })
	h2 := serveRaw(t, "h2", serveH2Path)
	for name, b := range map[string]*rawBackend{"h1": h1, "h2": h2} {
		x := newLegs(t, b.address)
		c := x.dialH2()
		for i, target := range targets {
			if _, got := x.send("GET " + target + " HTTP/1.1\r\nHost: public.test\r\n\r\n"); got != target {
				t.Errorf("h1 to %s: %q became %q", name, target, got)
			}
			if _, got := x.send("GET https://public.test" + target + " HTTP/1.1\r\nHost: public.test\r\n\r\n"); got != target {
				t.Errorf("absolute to %s: %q became %q", name, target, got)
			}
			if strings.HasPrefix(target, "//") {
				continue // x/net/http2 refuses it
			}
			c.get(uint32(2*i+1), target, "public.test")
			if a := c.answer(uint32(2*i + 1)); a.body != target {
				t.Errorf("h2 to %s: %q became %q %s", name, target, a.body, a.status)
			}
		}
	}
}

// serveH2Path answers with the request's path.
func serveH2Path(c net.Conn, _ int) {
	serveH2(c, func(framer *http2.Framer, f *http2.MetaHeadersFrame) {
		answerH2(framer, f.StreamID, status200, f.PseudoValue("path"))
	})
}

// TestRoutesAndPaths: a path has one meaning for routes, and a request that the
// backend may read as one of another route is refused.
func TestRoutesAndPaths(t *testing.T) {
	b := serveHTTP1(t, func(r *http.Request, _ []byte) string { return ok(r.Header.Get("X-Route")) })
	x := newLegs(t, b.address)
	at := func(name string, matches ...*resealv1.PathMatch) *resealv1.Resource {
		return route(name, &resealv1.Route{
			Listeners: []string{"web"}, Paths: matches, Pools: []*resealv1.WeightedPool{{Name: "p"}},
			RequestHeaders: &resealv1.HeaderEdits{Set: map[string]string{"X-Route": name}},
		})
	}
	prefix := func(path string) *resealv1.PathMatch {
		return &resealv1.PathMatch{Match: &resealv1.PathMatch_Prefix{Prefix: path}}
	}
	exact := func(path string) *resealv1.PathMatch {
		return &resealv1.PathMatch{Match: &resealv1.PathMatch_Exact{Exact: path}}
	}
	x.apply(at("admin", prefix("/admin")), at("coffee", exact("/caf%C3%A9")), at("space", exact("/a%20b")),
		at("tilde", prefix("/%7Euser/")), at("colon", exact("/a:b")), at("slash", prefix("/project/a%2fb")))
	for target, want := range map[string]string{
		"/admin": "admin", "/admin/x": "admin", "/%61dmin": "admin", "/%61%64min/x": "admin", "/adminx": "", "/Admin": "", "/admin?x": "admin",
		"/caf%C3%A9": "coffee", "/caf%c3%a9": "coffee", "/caf\xc3\xa9": "coffee", "/cafe": "", "/a%20b": "space", "/~user/x": "tilde", "/%7euser": "tilde",
		"/a%3Ab": "colon", "/a%3ab": "colon", "/project/a%2Fb/c": "slash", "/project/a/b": "", "/project/x%2Fy": "", "/": "", "/x//y": "", "/x/../y": "", "/admin/../admin": "admin",
		"/x/../admin": "400", "/x/%2e%2E/admin": "400", "/x/..%2fadmin": "400", "/admin/../x": "400", "//admin": "400", "/./admin": "400",
		"/x/..;v=1/admin": "400", "/x%2F..%2Fadmin": "400", "/admin%2Fx": "400", "/x/..%5cadmin": "400", "/x//../admin": "400", "/%2e/admin": "400",
		"/admin#x": "400", "/x#/../admin": "400", "/%zz": "400", "/%": "400",
	} {
		response, body := x.send("GET " + target + " HTTP/1.1\r\nHost: public.test\r\n\r\n")
		if response.StatusCode != 200 {
			body = fmt.Sprint(response.StatusCode)
		}
		if body != want {
			t.Errorf("%q went to %q, want %q", target, body, want)
		}
	}
}

// TestHTTP10WithoutHost: load balancers check like that. The listener has a pool
// and the pool a name, so nothing is left open.
func TestHTTP10WithoutHost(t *testing.T) {
	b := serveHTTP1(t, func(r *http.Request, _ []byte) string { return ok(r.Host) })
	x := newLegs(t, b.address)
	if response, body := x.send("GET /health HTTP/1.0\r\n\r\n"); response.StatusCode != 200 || body != "public.test" {
		t.Errorf("with SNI: %d %q", response.StatusCode, body)
	}
	if response, _ := x.send("GET /health HTTP/1.1\r\n\r\n"); response.StatusCode != 400 {
		t.Errorf("HTTP/1.1: %d", response.StatusCode)
	}
	conn := x.dialPlain("")
	if response, body := x.exchange(conn, bufio.NewReader(conn), "OPTIONS / HTTP/1.0\r\n\r\n"); response.StatusCode != 200 || body != "backend.test" {
		t.Errorf("without SNI: %d %q", response.StatusCode, body)
	}
}

// TestHostForBackend: a Route gives the backend another Host; the name in TLS
// stays.
func TestHostForBackend(t *testing.T) {
	b := serveHTTP1(t, func(r *http.Request, _ []byte) string {
		return ok(r.Host + " " + r.Header.Get("X-Forwarded-Host"))
	})
	x := newLegs(t, b.address)
	x.apply(route("named", &resealv1.Route{
		Listeners: []string{"web"}, Pools: []*resealv1.WeightedPool{{Name: "p"}},
		RequestHeaders: &resealv1.HeaderEdits{Set: map[string]string{"host": "inner.test:8443"}},
	}))
	if _, body := x.send("GET / HTTP/1.1\r\nHost: public.test\r\n\r\n"); body != "inner.test:8443 public.test" {
		t.Errorf("the backend saw %q", body)
	}
}
