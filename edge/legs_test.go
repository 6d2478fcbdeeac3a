package edge

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/proto"

	"github.com/reseal/reseal/edge/feed"
	"github.com/reseal/reseal/edge/share"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds waits for what must happen. Tests assert no times.
const patience = 20 * time.Second

// authority signs the certificates of the edge, of backends and of clients.
var authority = sync.OnceValue(func() (ca struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  string
	pool *x509.CertPool
}) {
	ca.key, _ = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &ca.key.PublicKey, ca.key)
	if err != nil {
		panic(err)
	}
	ca.cert, _ = x509.ParseCertificate(der)
	ca.pem = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	ca.pool = x509.NewCertPool()
	ca.pool.AddCert(ca.cert)
	return ca
})

// issue makes a certificate, changed by change.
func issue(t testing.TB, change func(*x509.Certificate), names ...string) tls.Certificate {
	t.Helper()
	ca := authority()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: names[0]}, DNSNames: names,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, &key.PublicKey, ca.key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der, ca.cert.Raw}, PrivateKey: key, Leaf: leaf}
}

func pemOf(t testing.TB, c tls.Certificate) (certificate, key string) {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]})),
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

// rawBackend is a TLS server that records what came on each connection.
type rawBackend struct {
	address string

	mu    sync.Mutex
	conns []*bytes.Buffer
	open  []net.Conn
}

// serveRaw runs serve on each connection, which is closed after it. n counts
// connections from 0.
func serveRaw(t testing.TB, alpn string, serve func(c net.Conn, n int)) *rawBackend {
	t.Helper()
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		Certificates: []tls.Certificate{issue(t, nil, "backend.test")},
		NextProtos:   []string{alpn}, CurvePreferences: []tls.CurveID{tls.X25519},
	})
	if err != nil {
		t.Fatal(err)
	}
	b := &rawBackend{address: listener.Addr().String()}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			b.mu.Lock()
			n := len(b.conns)
			b.conns, b.open = append(b.conns, &bytes.Buffer{}), append(b.open, conn)
			b.mu.Unlock()
			serving.Go(func() {
				defer conn.Close()
				serve(recorded{conn, b, n}, n)
			})
		}
	})
	t.Cleanup(func() {
		listener.Close()
		b.mu.Lock()
		for _, conn := range b.open {
			conn.(*tls.Conn).NetConn().Close()
		}
		b.mu.Unlock()
		serving.Wait()
	})
	return b
}

type recorded struct {
	net.Conn
	b *rawBackend
	n int
}

func (r recorded) Read(p []byte) (int, error) {
	n, err := r.Conn.Read(p)
	r.b.mu.Lock()
	r.b.conns[r.n].Write(p[:n])
	r.b.mu.Unlock()
	return n, err
}

// received is what came on each connection.
func (b *rawBackend) received() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var all []string
	for _, conn := range b.conns {
		all = append(all, conn.String())
	}
	return all
}

// status200 is the header block of a response that says no more.
var status200 = []byte{0x88}

// serveH2 speaks HTTP/2 as a server and lets each header or trailer section be
// answered.
func serveH2(c net.Conn, answer func(*http2.Framer, *http2.MetaHeadersFrame)) {
	reader := bufio.NewReader(c)
	if _, err := reader.Discard(len(http2.ClientPreface)); err != nil {
		return
	}
	framer := http2.NewFramer(c, reader)
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	_ = framer.WriteSettings()
	for {
		frame, err := framer.ReadFrame()
		if err != nil {
			return
		}
		switch f := frame.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				_ = framer.WriteSettingsAck()
			}
		case *http2.MetaHeadersFrame:
			answer(framer, f)
		}
	}
}

// answerH2 writes a response as a whole.
func answerH2(framer *http2.Framer, stream uint32, block []byte, body string) {
	_ = framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block, EndHeaders: true})
	_ = framer.WriteData(stream, true, []byte(body))
}

// serveHTTP1 answers each request by answer, until that returns "".
func serveHTTP1(t testing.TB, answer func(r *http.Request, body []byte) string) *rawBackend {
	return serveRaw(t, "http/1.1", func(c net.Conn, _ int) {
		reader := bufio.NewReader(c)
		for {
			r, err := http.ReadRequest(reader)
			if err != nil {
				return
			}
			body, err := io.ReadAll(r.Body)
			if err != nil {
				return
			}
			text := answer(r, body)
			if text == "" {
				return
			}
			if _, err := io.WriteString(c, text); err != nil {
				return
			}
		}
	})
}

// ok is a response with a text.
func ok(text string, fields ...string) string {
	return fmt.Sprintf("HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n%s", lines(fields), len(text), text)
}

func lines(fields []string) string {
	var b strings.Builder
	for _, field := range fields {
		b.WriteString(field + "\r\n")
	}
	return b.String()
}

// bothLegs is an edge without a control plane: a configuration, clients and
// backends.
type bothLegs struct {
	t         *testing.T
	edge      *Edge
	revision  int64
	resources []*resealv1.Resource
	log       *logLines
}

// logLines is the access log.
type logLines struct {
	mu    sync.Mutex
	lines []string
}

func (l *logLines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, string(p))
	return len(p), nil
}

func (l *logLines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.lines, "")
}

// newLegs starts an edge with the listener "web" for public.test and the pool
// "p" of the backend, each changed by change.
func newLegs(t *testing.T, backend string, change ...func(l *resealv1.Listener, p *resealv1.BackendPool)) *bothLegs {
	t.Helper()
	x := &bothLegs{t: t, log: &logLines{}}
	x.edge = New(Config{ID: "e", Logger: slog.New(slog.DiscardHandler), AccessLog: x.log})
	// Not run: nothing is shared here.
	x.edge.share = share.New(share.Config{Sessions: x.edge.sessions, Logger: slog.New(slog.DiscardHandler)})
	certificate, key := pemOf(t, issue(t, nil, "public.test", "*.wild.test"))
	listener := &resealv1.Listener{Address: "127.0.0.1:0", Certificates: []string{"front"}, TlsPolicy: "policy", Pool: "p"}
	pool := &resealv1.BackendPool{
		Endpoints: []*resealv1.Endpoint{{Address: backend}},
		Tls: &resealv1.BackendTLS{
			ServerName: "backend.test",
			Trust:      &resealv1.BackendTLS_Trust{Roots: &resealv1.BackendTLS_Trust_CaPem{CaPem: authority().pem}},
		},
	}
	for _, f := range change {
		f(listener, pool)
	}
	x.resources = []*resealv1.Resource{
		{Spec: &resealv1.Resource_Listener{Listener: listener}, Metadata: &resealv1.Metadata{Name: "web"}},
		{Spec: &resealv1.Resource_BackendPool{BackendPool: pool}, Metadata: &resealv1.Metadata{Name: "p"}},
		{Spec: &resealv1.Resource_Certificate{Certificate: &resealv1.Certificate{CertificatePem: certificate, PrivateKeyPem: key}}, Metadata: &resealv1.Metadata{Name: "front"}},
		{Spec: &resealv1.Resource_TlsPolicy{TlsPolicy: &resealv1.TLSPolicy{
			Resumption: &resealv1.Resumption{Enabled: proto.Bool(false)}, // there are no ticket keys here
			ClientAuth: &resealv1.ClientAuth{Mode: resealv1.ClientAuth_MODE_OPTIONAL, CaPem: authority().pem},
		}}, Metadata: &resealv1.Metadata{Name: "policy"}},
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	behind, stopBehind := context.WithCancel(context.Background())
	running.Go(func() { _ = x.edge.own(behind) })
	x.apply()
	looping, stopLoops := context.WithCancel(context.Background())
	var loops sync.WaitGroup
	loops.Go(func() { _ = x.edge.loops.Run(looping) })
	running.Go(func() { _ = x.edge.backend.Run(behind) })
	front := make(chan struct{})
	running.Go(func() { defer close(front); _ = x.edge.frontend.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		<-front
		stopBehind()
		running.Wait()
		stopLoops()
		loops.Wait()
	})
	return x
}

// apply serves the resources, with more.
func (x *bothLegs) apply(more ...*resealv1.Resource) {
	x.t.Helper()
	x.resources = append(x.resources, more...)
	x.revision++
	snapshot := resealv1.NewSnapshot("test", x.revision, x.resources)
	if outcome := x.edge.Apply(context.Background(), feed.Candidate{Snapshot: snapshot}); len(outcome.Violations) > 0 {
		x.t.Fatal(&resealv1.ViolationsError{Violations: outcome.Violations})
	}
}

func route(name string, r *resealv1.Route) *resealv1.Resource {
	return &resealv1.Resource{Spec: &resealv1.Resource_Route{Route: r}, Metadata: &resealv1.Metadata{Name: name}}
}

// dial opens a client's connection.
func (x *bothLegs) dial(alpn string, change ...func(*tls.Config)) *tls.Conn {
	x.t.Helper()
	config := &tls.Config{RootCAs: authority().pool, ServerName: "public.test", NextProtos: []string{alpn}}
	for _, f := range change {
		f(config)
	}
	conn, err := tls.Dial("tcp", x.edge.frontend.Addr("web").String(), config)
	if err != nil {
		x.t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	x.t.Cleanup(func() { conn.Close() })
	return conn
}

// dialPlain opens a client's connection with a name, or none, in its hello.
func (x *bothLegs) dialPlain(name string) *tls.Conn {
	x.t.Helper()
	return x.dial("http/1.1", func(c *tls.Config) { c.ServerName, c.InsecureSkipVerify = name, true })
}

// send writes bytes on a new HTTP/1.1 connection and reads one response.
func (x *bothLegs) send(request string) (*http.Response, string) {
	x.t.Helper()
	conn := x.dial("http/1.1")
	defer conn.Close()
	return x.exchange(conn, bufio.NewReader(conn), request)
}

func (x *bothLegs) exchange(conn net.Conn, reader *bufio.Reader, request string) (*http.Response, string) {
	x.t.Helper()
	if _, err := io.WriteString(conn, request); err != nil {
		x.t.Fatal(err)
	}
	response, err := http.ReadResponse(reader, nil)
	if err != nil {
		x.t.Fatalf("%.80q: %v", request, err)
	}
	body, err := io.ReadAll(response.Body)
	if err != nil {
		x.t.Fatalf("%.80q: %v", request, err)
	}
	return response, string(body)
}

// readAnswer reads one response.
func readAnswer(reader *bufio.Reader) (status int, body string, err error) {
	response, err := http.ReadResponse(reader, nil)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	return response.StatusCode, string(data), err
}

// h2Client speaks HTTP/2 frame by frame.
type h2Client struct {
	x      *bothLegs
	conn   *tls.Conn
	framer *http2.Framer
	block  bytes.Buffer
	encode *hpack.Encoder
}

func (x *bothLegs) dialH2(change ...func(*tls.Config)) *h2Client {
	x.t.Helper()
	conn := x.dial("h2", change...)
	c := &h2Client{x: x, conn: conn, framer: http2.NewFramer(conn, conn)}
	c.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	c.encode = hpack.NewEncoder(&c.block)
	c.must(io.WriteString(conn, http2.ClientPreface))
	c.try(c.framer.WriteSettings())
	return c
}

func (c *h2Client) must(_ int, err error) { c.x.t.Helper(); c.try(err) }

func (c *h2Client) try(err error) {
	c.x.t.Helper()
	if err != nil {
		c.x.t.Fatal(err)
	}
}

// fields encodes a header block of names and values in turn.
func (c *h2Client) fields(fields ...string) []byte {
	c.block.Reset()
	for i := 0; i < len(fields); i += 2 {
		c.try(c.encode.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}))
	}
	return c.block.Bytes()
}

// headers sends a header block.
func (c *h2Client) headers(stream uint32, end bool, fields ...string) {
	c.x.t.Helper()
	c.try(c.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: c.fields(fields...), EndHeaders: true, EndStream: end}))
}

// get sends a request without a body.
func (c *h2Client) get(stream uint32, path, authority string, more ...string) {
	c.x.t.Helper()
	c.headers(stream, true, append([]string{":method", "GET", ":scheme", "https", ":path", path, ":authority", authority}, more...)...)
}

// h2Answer is what became of a stream.
type h2Answer struct {
	status, body string
	fields       map[string]string
	reset        bool
	code         http2.ErrCode // of a reset, or of a GOAWAY
	away         bool
}

// answer reads until a stream or the connection has ended.
func (c *h2Client) answer(stream uint32) h2Answer {
	c.x.t.Helper()
	a := h2Answer{fields: map[string]string{}}
	for {
		frame, err := c.framer.ReadFrame()
		if err != nil {
			if a.away {
				return a
			}
			c.x.t.Fatalf("stream %d: %v", stream, err)
		}
		switch f := frame.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				c.try(c.framer.WriteSettingsAck())
			}
			continue
		case *http2.GoAwayFrame:
			if f.ErrCode != http2.ErrCodeNo {
				a.away, a.code = true, f.ErrCode
				return a
			}
			continue
		}
		if frame.Header().StreamID != stream {
			continue
		}
		switch f := frame.(type) {
		case *http2.MetaHeadersFrame:
			for _, field := range f.Fields {
				if field.Name == ":status" {
					a.status = field.Value
				}
				a.fields[field.Name] = field.Value
			}
			if f.StreamEnded() {
				return a
			}
		case *http2.DataFrame:
			a.body += string(f.Data())
			if f.StreamEnded() {
				return a
			}
		case *http2.RSTStreamFrame:
			a.reset, a.code = true, f.ErrCode
			return a
		}
	}
}
