package abbreviated

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"testing"
	"time"
)

// crypto/tls's server resumes by ticket alone. With a session_ticket extension in
// the Hello, which nothing but these tests puts there, it takes part: what it
// makes of our handshake and records, and we of its, is the same or an error.

// ticketed is a server of crypto/tls and what resumes a session of it. The ID is
// made up: the server echoes it when it takes the ticket (RFC 5077 section 3.4).
type ticketed struct {
	server *tls.Config
	cfg    Config
}

func newTicketed(t testing.TB, suite uint16) *ticketed {
	t.Helper()
	certificate, roots := issue(t)
	server := &tls.Config{Certificates: []tls.Certificate{certificate}, MaxVersion: tls.VersionTLS12, NextProtos: []string{"h2"}}
	cache := tls.NewLRUClientSessionCache(1)
	client := &tls.Config{
		RootCAs: roots, ServerName: testName, MaxVersion: tls.VersionTLS12, NextProtos: []string{"h2"},
		CipherSuites: []uint16{suite}, ClientSessionCache: cache,
	}
	var keys bytes.Buffer
	client.KeyLogWriter = &keys
	near, far := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- tls.Server(far, server).Handshake() }()
	full := tls.Client(near, client)
	if err := errors.Join(full.Handshake(), <-served); err != nil {
		t.Fatal(err)
	}
	near.Close()
	far.Close()
	state := full.ConnectionState()
	kept, ok := cache.Get(testName)
	if !ok {
		t.Fatal("no ticket")
	}
	ticket, _, err := kept.ResumptionState()
	if err != nil {
		t.Fatal(err)
	}
	client.KeyLogWriter, client.ClientSessionCache = nil, nil
	hello, err := HelloOf(client)
	if err != nil {
		t.Fatal(err)
	}
	hello.extensions = append(hello.extensions, extension{extensionSessionTicket, ticket})
	return &ticketed{server, Config{
		Session: Session{
			ID: bytes.Repeat([]byte{7}, 32), Secret: secretOf(t, keys.Bytes()), CipherSuite: state.CipherSuite,
			ExtendedMasterSecret: true, PeerCertificates: state.PeerCertificates, VerifiedChains: state.VerifiedChains,
		},
		Hello: hello, Config: client,
	}}
}

// testSuites are those that crypto/tls negotiates with an ECDSA certificate.
var testSuites = []uint16{
	gcm128, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
}

// TestAgainstCryptoTLS: handshake, records of all sizes, alerts and the end are
// understood by crypto/tls, and its by us.
func TestAgainstCryptoTLS(t *testing.T) {
	for _, suite := range testSuites {
		t.Run(fmt.Sprintf("%04x", suite), func(t *testing.T) {
			peer := newTicketed(t, suite)
			near, far := pair(t)
			var server *tls.Conn
			served := make(chan error, 1)
			go func() {
				server = tls.Server(far, peer.server)
				_, err := io.Copy(server, server) // until close_notify
				served <- errors.Join(err, server.CloseWrite())
			}()
			c := Client(near, peer.cfg)
			if err := c.HandshakeContext(t.Context()); err != nil {
				t.Fatal(err)
			}
			if state := c.ConnectionState(); state.NegotiatedProtocol != "h2" || state.CipherSuite != suite {
				t.Errorf("%+v", state)
			}
			for _, size := range []int{1, 2, 15, 16, 17, 1000, maxPlaintext - 1, maxPlaintext, maxPlaintext + 1, 200_000} {
				data := make([]byte, size)
				for i := range data {
					data[i] = byte(rand.Uint32())
				}
				sent := make(chan error, 1)
				go func() {
					_, err := c.Write(data)
					sent <- err
				}()
				got := make([]byte, size)
				if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, data) {
					t.Fatalf("%d bytes: the echo differs, %v", size, err)
				}
				if err := <-sent; err != nil {
					t.Fatal(err)
				}
			}
			if err := c.CloseWrite(); err != nil {
				t.Error(err)
			}
			if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Errorf("%d, %v", n, err)
			}
			if err := <-served; err != nil {
				t.Error(err)
			}
			if !server.ConnectionState().DidResume {
				t.Error("the server made a full handshake")
			}
		})
	}
}

// mangler changes what goes by: it cuts it into pieces and, once, changes a byte.
type mangler struct {
	net.Conn
	pieces  *rand.Rand
	target  int  // offset of the byte to change, or less than 0
	change  byte // XORed into it
	passed  int
	changed bool
}

func (m *mangler) Read(p []byte) (int, error) {
	n, err := m.Conn.Read(p[:min(len(p), 1+m.pieces.IntN(200))])
	if at := m.target - m.passed; at >= 0 && at < n && m.change != 0 {
		p[at] ^= m.change
		m.changed = true
	}
	m.passed += n
	return n, err
}

// FuzzAgainstCryptoTLS: whatever is changed in what crypto/tls's server sends or
// gets, and however it is cut, no other data than was sent is ever delivered,
// and a change is never taken for a success.
func FuzzAgainstCryptoTLS(f *testing.F) {
	f.Add(uint8(0), false, -1, byte(0), uint64(1), []byte("hello"))
	f.Add(uint8(1), false, 60, byte(1), uint64(2), []byte("hello"))
	f.Add(uint8(2), true, 200, byte(0x80), uint64(3), bytes.Repeat([]byte("x"), 20_000))
	var all []*ticketed
	for _, suite := range testSuites {
		all = append(all, newTicketed(f, suite))
	}
	f.Fuzz(func(t *testing.T, which uint8, up bool, target int, change byte, seed uint64, data []byte) {
		peer := all[int(which)%len(all)]
		near, far := pair(t)
		intact := target < 0 || change == 0
		if !intact { // a changed length makes both wait for the other
			_ = near.SetDeadline(time.Now().Add(200 * time.Millisecond))
			_ = far.SetDeadline(time.Now().Add(200 * time.Millisecond))
		}
		mangled := &mangler{pieces: rand.New(rand.NewPCG(seed, 0)), target: target, change: change}
		if up {
			mangled.Conn, far = far, mangled
		} else {
			mangled.Conn, near = near, mangled
		}
		type outcome struct {
			got []byte
			err error
		}
		served := make(chan outcome, 1)
		go func() {
			defer far.Close()
			server := tls.Server(far, peer.server)
			got, err := io.ReadAll(server)
			if err == nil {
				_, err = server.Write(got)
				_ = server.CloseWrite()
			}
			served <- outcome{got, err}
		}()
		c := Client(near, peer.cfg)
		err := c.HandshakeContext(t.Context())
		if err == nil {
			_, err = c.Write(data)
		}
		if err == nil {
			err = c.CloseWrite()
		}
		var back []byte
		if err == nil {
			back, err = io.ReadAll(c)
		}
		near.Close()
		server := <-served
		if !bytes.HasPrefix(data, server.got) || !bytes.HasPrefix(data, back) {
			t.Fatalf("sent %d bytes, the server got %d, back came %d", len(data), len(server.got), len(back))
		}
		whole := len(server.got) == len(data) && len(back) == len(data)
		if intact && (err != nil || server.err != nil || !whole) {
			t.Fatalf("nothing was changed: %v, %v", err, server.err)
		}
		// The version in the header of a hello's record is not protected, and neither
		// side looks at it (RFC 5246 appendix E.1).
		if mangled.changed && whole && err == nil && server.err == nil && target != 1 && target != 2 {
			t.Fatalf("byte %d was changed (up: %t) and nobody saw it", target, up)
		}
	})
}

// FuzzServer lets a server send anything. With a prefix of a right flight it gets
// further than by chance.
func FuzzServer(f *testing.F) {
	f.Add(uint8(0), uint16(0), []byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
	f.Add(uint8(1), uint16(0xffff), []byte{23, 3, 3, 0, 1, 0})
	f.Add(uint8(2), uint16(100), []byte{21, 3, 3, 0, 2, 1, 0})
	f.Fuzz(func(t *testing.T, which uint8, kept uint16, tail []byte) {
		suite := suitesUnderTest[int(which)%len(suitesUnderTest)]
		memory := &scripted{session: sessionOf(suite, true), kept: int(kept), tail: tail}
		c := Client(memory, Config{Session: memory.session, Config: plainConfig("h2")})
		err := c.Handshake()
		// What the test adds may be the byte that was cut off, once in 256 times.
		whole := memory.sent != nil && bytes.HasPrefix(memory.served, memory.flight)
		if (err == nil) != whole {
			t.Fatalf("%d bytes of %d of a flight: %v", memory.kept, len(memory.flight), err)
		}
		// The tail may be the end of the flight, and nothing more.
		exact := whole && len(memory.served) == len(memory.flight)
		if got, err := io.ReadAll(c); len(got) > 0 || err == nil && !exact && memory.sent != nil {
			t.Fatalf("read %q, %v", got, err)
		}
		c.Close()
	})
}

// scripted is a connection that answers a ClientHello with a part of the right
// flight and what a test wants.
type scripted struct {
	listener
	session Session
	kept    int
	tail    []byte
	flight  []byte // the right one
	served  []byte
	answer  *bytes.Reader
}

func (s *scripted) Read(p []byte) (int, error) {
	if s.answer == nil {
		f := &fake{session: s.session, suite: suiteByID(s.session.CipherSuite), clientHello: s.sent[headerSize:]}
		s.flight = f.flight(nil)
		s.served = slices.Concat(s.flight[:min(s.kept, len(s.flight))], s.tail)
		s.answer = bytes.NewReader(s.served)
	}
	return s.answer.Read(p)
}

// FuzzServerHello: the parser takes what can be told apart, and only that.
func FuzzServerHello(f *testing.F) {
	fakeServer := &fake{session: sessionOf(gcm128, true), suite: suiteByID(gcm128), clientHello: make([]byte, 100)}
	f.Add(fakeServer.answer(nil)[messageHeader:])
	f.Add(fakeServer.answer(func(a *answer) { a.none = true })[messageHeader:])
	f.Add(fakeServer.answer(with(extensionALPN, 0, 3, 2, 'h', '2'))[messageHeader:])
	f.Add(fakeServer.answer(with(extensionPointFormats, 1, 0))[messageHeader:])
	hello, err := HelloOf(plainConfig("h2"))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		answer, ok := parseServerHello(body)
		if !ok {
			return
		}
		cfg := Config{Session: fakeServer.session, Hello: hello, Config: plainConfig("h2")}
		protocol, refused := cfg.judge(&answer)
		if refused == nil && (!bytes.Equal(answer.id, cfg.Session.ID) || answer.suite != gcm128 || protocol != "" && protocol != "h2" ||
			answer.find(extensionExtendedMasterSecret) == nil || answer.version != version12 || answer.compression != 0) {
			t.Fatalf("%+v is taken", answer)
		}
	})
}

// FuzzParseHello: what is parsed makes the same again.
func FuzzParseHello(f *testing.F) {
	for _, cfg := range []*tls.Config{plainConfig("h2", "http/1.1"), {ServerName: testName}} {
		var heard listener
		_ = tls.Client(&heard, cfg).Handshake()
		f.Add(heard.sent[headerSize:])
	}
	f.Fuzz(func(t *testing.T, message []byte) {
		hello, err := ParseHello(message)
		if err != nil {
			return
		}
		again, err := hello.message(make([]byte, 32), make([]byte, randomSize))
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := ParseHello(again)
		if err != nil || fmt.Sprint(parsed) != fmt.Sprint(hello) {
			t.Fatalf("%v\n%v\n%v", hello, parsed, err)
		}
	})
}

// FuzzRecords lets a server send records of any type and content after the
// handshake, cut anywhere: what is delivered is what was sent as data.
func FuzzRecords(f *testing.F) {
	f.Add(uint8(0), uint64(1), []byte{23, 5, 'h', 'e', 'l', 'l', 'o', 21, 2, 1, 0})
	f.Add(uint8(1), uint64(2), []byte{22, 4, 0, 0, 0, 0, 23, 1, 'x'})
	f.Add(uint8(2), uint64(3), []byte{23, 0, 23, 0, 20, 1, 1})
	f.Fuzz(func(t *testing.T, which uint8, seed uint64, script []byte) {
		suite := suitesUnderTest[int(which)%len(suitesUnderTest)]
		server := &fake{session: sessionOf(suite, true), suite: suiteByID(suite)}
		server.clientHello = make([]byte, 100)
		server.answer(nil)
		server.sealed = true
		opening := *server.writing
		var stream, data []byte
		for len(script) >= 2 {
			kind, size := script[0], min(int(script[1]), len(script)-2)
			content := script[2 : 2+size]
			script = script[2+size:]
			stream = append(stream, server.seal(kind, content)...)
			if kind == recordApplicationData {
				data = append(data, content...)
			}
		}
		memory := &pieces{Reader: bytes.NewReader(stream), random: rand.New(rand.NewPCG(seed, 0))}
		c := Client(memory, Config{})
		c.in.protection, c.out.protection, c.greeted = &opening, server.reading, true
		c.done.Store(true)
		got, err := io.ReadAll(c)
		if !bytes.HasPrefix(data, got) || err == nil && memory.Len() > 0 && c.in.err != io.EOF {
			t.Fatalf("read %x of %x, %v", got, data, err)
		}
	})
}

// pieces hands out a stream in pieces of any size.
type pieces struct {
	listener
	*bytes.Reader
	random *rand.Rand
}

func (p *pieces) Read(b []byte) (int, error) {
	return p.Reader.Read(b[:min(len(b), 1+p.random.IntN(40))])
}
func (p *pieces) Write(b []byte) (int, error) { return len(b), nil }

// BenchmarkResumption compares a resumed handshake with crypto/tls's, both against
// crypto/tls's server.
func BenchmarkResumption(b *testing.B) {
	for _, suite := range testSuites {
		peer := newTicketed(b, suite)
		b.Run(fmt.Sprintf("%s/ours", tls.CipherSuiteName(suite)), func(b *testing.B) {
			benchmarkHandshakes(b, peer.server, func(conn net.Conn) (bool, error) {
				c := Client(conn, peer.cfg)
				return true, c.Handshake()
			})
		})
		b.Run(fmt.Sprintf("%s/crypto-tls", tls.CipherSuiteName(suite)), func(b *testing.B) {
			client := peer.cfg.Config.Clone()
			client.ClientSessionCache = tls.NewLRUClientSessionCache(1)
			first := true
			benchmarkHandshakes(b, peer.server, func(conn net.Conn) (bool, error) {
				c := tls.Client(conn, client)
				err := c.Handshake()
				resumed := first || c.ConnectionState().DidResume
				first = false
				return resumed, err
			})
		})
	}
}

// benchmarkHandshakes runs clients against a server in memory, once more than it
// measures.
func benchmarkHandshakes(b *testing.B, server *tls.Config, client func(net.Conn) (resumed bool, _ error)) {
	b.ReportAllocs()
	for i := range b.N + 1 {
		if i == 1 {
			b.ResetTimer()
		}
		near, far := pair(b)
		served := make(chan error, 1)
		go func() { served <- tls.Server(far, server).Handshake() }()
		resumed, err := client(near)
		if err := errors.Join(err, <-served); err != nil || !resumed {
			b.Fatal(err, resumed)
		}
		near.Close()
		far.Close()
	}
}

// BenchmarkTransfer reads and writes in memory.
func BenchmarkTransfer(b *testing.B) {
	for _, suite := range suitesUnderTest {
		for _, size := range []int{200, maxPlaintext} {
			b.Run(fmt.Sprintf("write/%s/%d", tls.CipherSuiteName(suite), size), func(b *testing.B) {
				server := &fake{session: sessionOf(suite, true), suite: suiteByID(suite), clientHello: make([]byte, 100)}
				server.answer(nil)
				c := Client(&still{}, Config{})
				c.out.protection = server.reading
				c.done.Store(true)
				data := make([]byte, size)
				b.SetBytes(int64(size))
				b.ReportAllocs()
				for range b.N {
					if _, err := c.Write(data); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
