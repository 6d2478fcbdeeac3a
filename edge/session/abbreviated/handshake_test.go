package abbreviated

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"
)

const noAlert tls.AlertError = 255

// deviation is a server that does something else than resume the session.
type deviation struct {
	serve func(*fake)
	alert tls.AlertError // that ours must send
	err   error          // that must be in the chain, if any
}

// hello is a deviation in the ServerHello, with a flight that is right otherwise.
func hello(alert tls.AlertError, change func(*answer)) deviation {
	return deviation{serve: func(f *fake) { f.send(f.flight(change)) }, alert: alert}
}

// body is a deviation in the bytes of the ServerHello.
func body(alert tls.AlertError, change func([]byte) []byte) deviation {
	return deviation{serve: func(f *fake) {
		message := change(bytes.Clone(f.answer(nil)))
		f.send(f.seal(recordHandshake, message), f.ccs(), f.seal(recordHandshake, f.finished()))
	}, alert: alert}
}

// later is a deviation after a good ServerHello.
func later(alert tls.AlertError, serve func(*fake)) deviation {
	return deviation{serve: func(f *fake) {
		f.send(f.seal(recordHandshake, f.answer(nil)))
		serve(f)
	}, alert: alert}
}

// with adds an extension to the ServerHello, in place of one of the same kind.
func with(kind uint16, data ...byte) func(*answer) {
	return func(a *answer) {
		a.extensions = slices.DeleteFunc(a.extensions, func(e extension) bool { return e.kind == kind })
		a.extensions = append(a.extensions, extension{kind, data})
	}
}

func without(kind uint16) func(*answer) {
	return func(a *answer) {
		a.extensions = slices.DeleteFunc(a.extensions, func(e extension) bool { return e.kind == kind })
	}
}

// deviations are what a server may do wrong, or what is not a resumption, by what
// the attempt must end with. The session has extended_master_secret, h2 and
// http/1.1 are offered.
var deviations = map[string]deviation{
	"another session ID": {func(f *fake) { f.send(f.flight(func(a *answer) { a.id = make([]byte, 32) })) }, alertUserCanceled, ErrDeclined},
	"no session ID":      {func(f *fake) { f.send(f.flight(func(a *answer) { a.id = nil })) }, alertUserCanceled, ErrDeclined},
	"the ID cut short":   {func(f *fake) { f.send(f.flight(func(a *answer) { a.id = a.id[:31] })) }, alertUserCanceled, ErrDeclined},
	"declined with another suite and EMS": {func(f *fake) {
		f.send(f.seal(recordHandshake, f.answer(func(a *answer) { a.id, a.suite, a.extensions = nil, 0xc014, nil })))
	}, alertUserCanceled, ErrDeclined},
	"declined with unknown extensions": {func(f *fake) {
		f.send(f.seal(recordHandshake, f.answer(func(a *answer) { a.id = nil; with(0x1234, 1)(a) })))
	}, alertUserCanceled, ErrDeclined},
	"TLS 1.1": {func(f *fake) { f.send(f.flight(func(a *answer) { a.version = tls.VersionTLS11 })) }, alertProtocolVersion, ErrVersionChanged},
	"TLS 1.0": {func(f *fake) { f.send(f.flight(func(a *answer) { a.version = tls.VersionTLS10 })) }, alertProtocolVersion, ErrVersionChanged},
	"SSL 3":   {func(f *fake) { f.send(f.flight(func(a *answer) { a.version = 0x0300 })) }, alertProtocolVersion, ErrVersionChanged},
	"TLS 1.3 in the version": {func(f *fake) {
		f.send(f.flight(func(a *answer) { a.version = tls.VersionTLS13 }))
	}, alertProtocolVersion, ErrVersionChanged},
	"TLS 1.3 in supported_versions": hello(alertUnsupportedExtension, with(43, 3, 4)),
	"another suite":                 hello(alertIllegalParameter, func(a *answer) { a.suite = tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384 }),
	"a suite of TLS 1.3":            hello(alertIllegalParameter, func(a *answer) { a.suite = tls.TLS_AES_128_GCM_SHA256 }),
	"compression":                   hello(alertIllegalParameter, func(a *answer) { a.compression = 1 }),
	"no EMS":                        hello(alertHandshakeFailure, without(extensionExtendedMasterSecret)),
	"no extensions at all":          hello(alertHandshakeFailure, func(a *answer) { a.none = true }),
	"EMS not empty":                 hello(alertDecodeError, with(extensionExtendedMasterSecret, 0)),
	"session_ticket unasked":        hello(alertUnsupportedExtension, with(extensionSessionTicket)),
	"an unknown extension":          hello(alertUnsupportedExtension, with(0x4469, 1, 2)),
	"status_request":                hello(alertUnsupportedExtension, with(5)),
	"signed_certificate_timestamp":  hello(alertUnsupportedExtension, with(18)),
	"encrypt_then_mac":              hello(alertUnsupportedExtension, with(22)),
	"key_share":                     hello(alertUnsupportedExtension, with(51, 0, 29, 0, 0)),
	"pre_shared_key":                hello(alertUnsupportedExtension, with(41, 0, 0)),
	"signature_algorithms":          hello(alertUnsupportedExtension, with(extensionSignatureAlgorithms, 0, 2, 4, 3)),
	"an extension twice": hello(alertDecodeError, func(a *answer) {
		a.extensions = append(a.extensions, extension{extensionRenegotiationInfo, []byte{0}})
	}),
	"server_name not empty":         hello(alertDecodeError, with(extensionServerName, 0)),
	"renegotiation_info of another": hello(alertHandshakeFailure, with(extensionRenegotiationInfo, 1, 7)),
	"renegotiation_info malformed":  hello(alertDecodeError, with(extensionRenegotiationInfo)),
	"renegotiation_info too long":   hello(alertDecodeError, with(extensionRenegotiationInfo, 0, 0)),
	"no uncompressed points":        hello(alertIllegalParameter, with(extensionPointFormats, 1, 1)),
	"point formats malformed":       hello(alertDecodeError, with(extensionPointFormats, 2, 0)),
	"point formats empty":           hello(alertDecodeError, with(extensionPointFormats, 0)),
	"ALPN not offered":              hello(alertIllegalParameter, with(extensionALPN, 0, 3, 2, 'h', '3')),
	"ALPN two":                      hello(alertDecodeError, with(extensionALPN, 0, 6, 2, 'h', '2', 2, 'h', '2')),
	"ALPN empty":                    hello(alertDecodeError, with(extensionALPN, 0, 0)),
	"ALPN with an empty name":       hello(alertDecodeError, with(extensionALPN, 0, 1, 0)),
	"ALPN trailing":                 hello(alertDecodeError, with(extensionALPN, 0, 3, 2, 'h', '2', 0)),
	"trailing bytes":                hello(alertDecodeError, func(a *answer) { a.trailing = []byte{0} }),
	"an ID of 33 bytes":             hello(alertDecodeError, func(a *answer) { a.id = make([]byte, 33) }),
	"ServerHello cut": body(alertDecodeError, func(message []byte) []byte {
		return handshakeMessage(messageServerHello, message[messageHeader:messageHeader+36])
	}),
	"ServerHello empty": body(alertDecodeError, func([]byte) []byte { return handshakeMessage(messageServerHello, nil) }),
	"ServerHello too long": body(alertIllegalParameter, func([]byte) []byte {
		return handshakeMessage(messageServerHello, make([]byte, maxServerHello))
	}),
	"ServerHello said to be enormous": body(alertIllegalParameter, func([]byte) []byte {
		return []byte{messageServerHello, 0xff, 0xff, 0xff, 0}
	}),
	"Certificate in place of ServerHello": body(alertUnexpectedMessage, func([]byte) []byte { return handshakeMessage(11, []byte{0, 0, 0}) }),
	"Finished in place of ServerHello":    body(alertUnexpectedMessage, func([]byte) []byte { return handshakeMessage(messageFinished, make([]byte, 12)) }),
	"ClientHello in place of ServerHello": {serve: func(f *fake) { f.send(f.seal(recordHandshake, f.clientHello)) }, alert: alertUnexpectedMessage},
	"Certificate after ServerHello": body(alertUnexpectedMessage, func(message []byte) []byte {
		return append(message, handshakeMessage(11, []byte{0, 0, 0})...)
	}),
	"a ticket after ServerHello": body(alertUnexpectedMessage, func(message []byte) []byte {
		return append(message, handshakeMessage(messageNewSessionTicket, []byte{0, 0, 1, 0, 0, 1, 7})...)
	}),
	"ServerHelloDone in a record of its own": later(alertUnexpectedMessage, func(f *fake) {
		f.send(f.seal(recordHandshake, handshakeMessage(14, nil)))
	}),
	"a ticket in a record of its own": later(alertUnexpectedMessage, func(f *fake) {
		f.send(f.seal(recordHandshake, handshakeMessage(messageNewSessionTicket, []byte{0, 0, 1, 0, 0, 1, 7})))
	}),
	"a fragment before ChangeCipherSpec": body(alertUnexpectedMessage, func(message []byte) []byte { return append(message, messageFinished, 0) }),
	"ChangeCipherSpec first": {serve: func(f *fake) {
		f.answer(nil)
		f.send(f.ccs(), f.seal(recordHandshake, f.serverHello))
	}, alert: alertUnexpectedMessage},
	"ChangeCipherSpec of 0": later(alertDecodeError, func(f *fake) { f.send(f.seal(recordChangeCipherSpec, []byte{0})) }),
	"ChangeCipherSpec of two bytes": later(alertDecodeError, func(f *fake) {
		f.send(f.seal(recordChangeCipherSpec, []byte{1, 1}))
	}),
	"no ChangeCipherSpec":   later(alertUnexpectedMessage, func(f *fake) { f.send(f.seal(recordHandshake, f.finished())) }),
	"Finished in clear":     later(alertBadRecordMAC, func(f *fake) { f.send(f.ccs()); f.sealed = false; f.send(f.seal(recordHandshake, f.finished())) }),
	"two ChangeCipherSpecs": later(alertBadRecordMAC, func(f *fake) { f.send(f.ccs()); f.sealed = false; f.send(f.ccs()) }),
	"Finished wrong": later(alertDecryptError, func(f *fake) {
		message := f.finished()
		message[len(message)-1] ^= 1
		f.send(f.ccs(), f.seal(recordHandshake, message))
	}),
	"the client's Finished in its place": later(alertDecryptError, func(f *fake) {
		message := handshakeMessage(messageFinished, f.suite.finished(f.session.Secret, clientFinished, f.clientHello, f.serverHello))
		f.send(f.ccs(), f.seal(recordHandshake, message))
	}),
	"Finished of another secret": {serve: func(f *fake) {
		f.answer(nil)
		hello := f.serverHello
		f.session.Secret[0] ^= 1
		message := f.finished()
		f.send(f.seal(recordHandshake, hello), f.ccs(), f.seal(recordHandshake, message))
	}, alert: alertDecryptError},
	"keys of another secret": {serve: func(f *fake) {
		f.session.Secret[47] ^= 1
		f.send(f.flight(nil))
	}, alert: alertBadRecordMAC},
	"Finished short": later(alertDecodeError, func(f *fake) {
		f.send(f.ccs(), f.seal(recordHandshake, handshakeMessage(messageFinished, f.finished()[messageHeader:messageHeader+11])))
	}),
	"Finished empty": later(alertDecodeError, func(f *fake) { f.send(f.ccs(), f.seal(recordHandshake, handshakeMessage(messageFinished, nil))) }),
	"Finished long": later(alertIllegalParameter, func(f *fake) {
		f.send(f.ccs(), f.seal(recordHandshake, handshakeMessage(messageFinished, append(f.finished()[messageHeader:], 0))))
	}),
	"Finished and more": later(alertUnexpectedMessage, func(f *fake) {
		f.send(f.ccs(), f.seal(recordHandshake, append(f.finished(), 0)))
	}),
	"another message in place of Finished": later(alertUnexpectedMessage, func(f *fake) {
		f.finished()
		f.send(f.ccs(), f.seal(recordHandshake, handshakeMessage(14, make([]byte, 12))))
	}),
	"data in place of Finished": later(alertUnexpectedMessage, func(f *fake) {
		f.finished()
		f.send(f.ccs(), f.seal(recordApplicationData, []byte("HTTP/1.1 200 OK\r\n\r\n")))
	}),
	"a damaged tag": later(alertBadRecordMAC, func(f *fake) {
		sealed := f.ccs()
		finished := f.seal(recordHandshake, f.finished())
		finished[len(finished)-1] ^= 0x80
		f.send(sealed, finished)
	}),
	"a record shorter than a tag": later(alertBadRecordMAC, func(f *fake) {
		f.send(f.ccs(), append(appendHeader(nil, recordHandshake, 15), make([]byte, 15)...))
	}),
	"an encrypted record of nothing": later(alertBadRecordMAC, func(f *fake) { f.send(f.ccs(), appendHeader(nil, recordHandshake, 0)) }),
	"a record sealed for another type": later(alertBadRecordMAC, func(f *fake) {
		sealed := f.ccs()
		finished := f.seal(recordApplicationData, f.finished())
		finished[0] = recordHandshake
		f.send(sealed, finished)
	}),
	"data in clear":             {serve: func(f *fake) { f.send(f.seal(recordApplicationData, []byte("GET /"))) }, alert: alertUnexpectedMessage},
	"plain HTTP":                {serve: func(f *fake) { f.send([]byte("HTTP/1.1 400 Bad Request\r\n\r\n")) }, alert: alertUnexpectedMessage},
	"SSL 2":                     {serve: func(f *fake) { f.send([]byte{0x80, 11, 4, 0, 1, 0, 2, 0, 0, 0, 3, 0, 0}) }, alert: alertUnexpectedMessage},
	"an empty handshake record": {serve: func(f *fake) { f.send(f.seal(recordHandshake, nil)) }, alert: alertUnexpectedMessage},
	"an empty alert":            {serve: func(f *fake) { f.send(f.seal(recordAlert, nil)) }, alert: alertUnexpectedMessage},
	"half an alert":             {serve: func(f *fake) { f.send(f.seal(recordAlert, []byte{1})) }, alert: alertDecodeError},
	"two alerts in a record":    {serve: func(f *fake) { f.send(f.seal(recordAlert, []byte{1, 112, 1, 112})) }, alert: alertDecodeError},
	"an alert of another level": {serve: func(f *fake) { f.send(f.seal(recordAlert, []byte{3, 40})) }, alert: alertIllegalParameter},
	"a record too long":         {serve: func(f *fake) { f.send(appendHeader(nil, recordHandshake, maxPlaintext+1)) }, alert: alertRecordOverflow},
	"an encrypted record too long": later(alertRecordOverflow, func(f *fake) {
		f.send(f.ccs(), appendHeader(nil, recordHandshake, maxPlaintext+f.writing.overhead()+1))
	}),
	"a later record of TLS 1.0": later(alertProtocolVersion, func(f *fake) {
		sealed := f.ccs()
		sealed[2] = 1
		f.send(sealed)
	}),
	"a record of version 4": {serve: func(f *fake) { f.send([]byte{recordHandshake, 4, 0, 0, 1, 2}) }, alert: alertUnexpectedMessage},
	"warnings without end": {serve: func(f *fake) {
		for range maxUseless + 1 {
			f.send(f.seal(recordAlert, []byte{levelWarning, 112}))
		}
	}, alert: alertUnexpectedMessage},
	"HelloRequests without end": {serve: func(f *fake) {
		for range maxUseless + 1 {
			f.send(f.seal(recordHandshake, handshakeMessage(messageHelloRequest, nil)))
		}
	}, alert: alertUnexpectedMessage},
	"protocol_version": {func(f *fake) { f.send(f.seal(recordAlert, []byte{levelFatal, byte(alertProtocolVersion)})) }, noAlert, ErrVersionChanged},
	"close_notify":     {func(f *fake) { f.send(f.seal(recordAlert, []byte{levelWarning, 0})) }, noAlert, io.ErrUnexpectedEOF},
	"close_notify after ServerHello": {func(f *fake) {
		f.send(f.seal(recordHandshake, f.answer(nil)), f.seal(recordAlert, []byte{levelWarning, 0}))
	}, noAlert, io.ErrUnexpectedEOF},
	"FIN at once":           {func(*fake) {}, noAlert, io.ErrUnexpectedEOF},
	"FIN after ServerHello": {func(f *fake) { f.send(f.seal(recordHandshake, f.answer(nil))) }, noAlert, io.ErrUnexpectedEOF},
	"FIN within a header":   {func(f *fake) { f.send([]byte{recordHandshake, 3}) }, noAlert, io.ErrUnexpectedEOF},
	"FIN within a record":   {func(f *fake) { f.send(f.flight(nil)[:20]) }, noAlert, io.ErrUnexpectedEOF},
	"FIN before the tag":    {func(f *fake) { flight := f.flight(nil); f.send(flight[:len(flight)-1]) }, noAlert, io.ErrUnexpectedEOF},
}

// TestDeviations: whatever a server does wrong ends the attempt with the right
// alert, and before any byte of the application.
func TestDeviations(t *testing.T) {
	for name, test := range deviations {
		for _, suite := range suitesUnderTest {
			t.Run(fmt.Sprintf("%s/%04x", name, suite), func(t *testing.T) {
				cfg := Config{Session: sessionOf(suite, true), Config: plainConfig("h2", "http/1.1")}
				c, wait := against(t, cfg, test.serve)
				checkFailure(t, c, wait, test)
			})
		}
	}
}

func checkFailure(t *testing.T, c *Conn, wait func() *fake, test deviation) {
	t.Helper()
	err := c.HandshakeContext(t.Context())
	if err == nil || test.err != nil && !errors.Is(err, test.err) {
		t.Fatalf("error %v, want %v", err, test.err)
	}
	if test.err == nil {
		for _, sentinel := range []error{ErrDeclined, ErrVersionChanged} {
			if errors.Is(err, sentinel) {
				t.Errorf("%v is taken for %v", err, sentinel)
			}
		}
		var alert tls.AlertError
		if !errors.As(err, &alert) || alert != test.alert {
			t.Errorf("error %v, want alert %d in it", err, test.alert)
		}
	}
	if again := c.Handshake(); again == nil || again.Error() != err.Error() {
		t.Errorf("the second handshake: %v, not %v", again, err)
	}
	if n, err := c.Write([]byte("GET / HTTP/1.1\r\n\r\n")); n != 0 || err == nil {
		t.Errorf("wrote %d, %v", n, err)
	}
	if n, err := c.Read(make([]byte, 10)); n != 0 || err == nil {
		t.Errorf("read %d, %v", n, err)
	}
	if c.ConnectionState().HandshakeComplete {
		t.Error("the handshake counts as complete")
	}
	f := wait()
	var want []tls.AlertError
	if test.alert != noAlert {
		want = append(want, test.alert)
	}
	if test.alert == alertUserCanceled {
		want = append(want, alertCloseNotify)
	}
	if got := f.alerts(); !slices.Equal(got, want) {
		t.Errorf("alerts %v, want %v", got, want)
	}
	for i, r := range f.records[1:] {
		if r.kind != recordAlert {
			t.Errorf("record %d is of type %d", i+1, r.kind)
		}
	}
}

// Fatal alerts of all kinds end the handshake wherever they come, and are found
// in the error.
func TestFatalAlerts(t *testing.T) {
	for code := 1; code < 256; code++ {
		alert := []byte{levelFatal, byte(code)}
		for where, serve := range map[string]func(*fake){
			"before":  func(f *fake) { f.send(f.seal(recordAlert, alert)) },
			"between": func(f *fake) { f.send(f.seal(recordHandshake, f.answer(nil)), f.seal(recordAlert, alert)) },
			"sealed": func(f *fake) {
				f.send(f.seal(recordHandshake, f.answer(nil)), f.ccs(), f.seal(recordAlert, alert))
			},
		} {
			c, wait := against(t, Config{Session: sessionOf(gcm128, true), Config: plainConfig()}, serve)
			err := c.Handshake()
			var got tls.AlertError
			var op *net.OpError
			if !errors.As(err, &got) || got != tls.AlertError(code) || !errors.As(err, &op) || op.Op != "remote error" {
				t.Errorf("alert %d %s the flight: %v", code, where, err)
			}
			if errors.Is(err, ErrVersionChanged) != (where == "before" && got == alertProtocolVersion) {
				t.Errorf("alert %d %s the flight: %v", code, where, err)
			}
			if f := wait(); len(f.alerts()) > 0 {
				t.Errorf("alert %d was answered with %v", code, f.alerts())
			}
		}
	}
}

// Warnings are skipped wherever they come.
func TestWarnings(t *testing.T) {
	for code := 1; code < 256; code++ {
		c, wait := against(t, Config{Session: sessionOf(gcm128, true), Config: plainConfig()}, func(f *fake) {
			warn := []byte{levelWarning, byte(code)}
			request := handshakeMessage(messageHelloRequest, nil)
			f.send(f.seal(recordAlert, warn), f.seal(recordHandshake, request), f.seal(recordHandshake, f.answer(nil)),
				f.seal(recordAlert, warn), f.ccs(), f.seal(recordAlert, warn), f.seal(recordHandshake, f.finished()))
			if err := f.complete(); err != nil {
				t.Error(err)
			}
			f.send(f.seal(recordAlert, warn), f.seal(recordApplicationData, []byte("x")))
		})
		if got, err := io.ReadAll(c); string(got) != "x" || err != nil {
			t.Errorf("warning %d: %q, %v", code, got, err)
		}
		wait()
	}
}

// Every answer that is in order is accepted.
func TestAnswers(t *testing.T) {
	for name, test := range map[string]struct {
		change   func(*answer)
		protocol string
	}{
		"as usual":            {nil, ""},
		"server_name":         {with(extensionServerName), ""},
		"h2":                  {with(extensionALPN, 0, 3, 2, 'h', '2'), "h2"},
		"http/1.1":            {with(extensionALPN, append([]byte{0, 9, 8}, "http/1.1"...)...), "http/1.1"},
		"point formats":       {with(extensionPointFormats, 3, 1, 0, 2), ""},
		"groups":              {with(extensionGroups, 0, 2, 0, 29), ""},
		"no renegotiation":    {without(extensionRenegotiationInfo), ""},
		"sentinel of TLS 1.3": {func(a *answer) { copy(a.random[24:], couldSpeakTLS13) }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := Config{Session: sessionOf(gcm128, true), Config: plainConfig("h2", "http/1.1")}
			c, wait := against(t, cfg, func(f *fake) {
				f.send(f.flight(test.change))
				if err := f.complete(); err != nil {
					t.Error(err)
				}
			})
			defer wait()
			if err := c.HandshakeContext(t.Context()); err != nil {
				t.Fatal(err)
			}
			state := c.ConnectionState()
			if !state.HandshakeComplete || !state.DidResume || state.Version != tls.VersionTLS12 ||
				state.CipherSuite != gcm128 || state.NegotiatedProtocol != test.protocol || state.ServerName != testName {
				t.Errorf("%+v", state)
			}
		})
	}
}

// A session without extended master secret is resumed without it, and only so.
func TestWithoutExtendedMasterSecret(t *testing.T) {
	cfg := Config{Session: sessionOf(gcm128, false), Config: plainConfig()}
	c, wait := against(t, cfg, func(f *fake) {
		f.send(f.flight(func(a *answer) { a.none = true }))
		if err := f.complete(); err != nil {
			t.Error(err)
		}
	})
	if err := c.Handshake(); err != nil {
		t.Error(err)
	}
	wait()
	c, wait = against(t, cfg, func(f *fake) { f.send(f.flight(with(extensionExtendedMasterSecret))) })
	checkFailure(t, c, wait, deviation{alert: alertHandshakeFailure})
}

// TestVersionChanged: a pool that allows TLS 1.3 heeds the sign of a server that
// could speak it by now.
func TestVersionChanged(t *testing.T) {
	for _, sentinel := range []string{couldSpeakTLS13, couldSpeakTLS12} {
		for _, highest := range []uint16{0, tls.VersionTLS13} {
			cfg := Config{Session: sessionOf(gcm128, true), Config: plainConfig()}
			cfg.Config.MaxVersion = highest
			c, wait := against(t, cfg, func(f *fake) {
				f.send(f.flight(func(a *answer) { copy(a.random[24:], sentinel) }))
			})
			checkFailure(t, c, wait, deviation{alert: alertIllegalParameter, err: ErrVersionChanged})
		}
	}
}

// The flight may be cut into records and segments anywhere.
func TestSplits(t *testing.T) {
	for _, suite := range suitesUnderTest {
		t.Run(fmt.Sprintf("%04x", suite), func(t *testing.T) {
			cfg := Config{Session: sessionOf(suite, true), Config: plainConfig()}
			transfer := func(cut func(f *fake) [][]byte) {
				t.Helper()
				c, wait := against(t, cfg, func(f *fake) {
					for _, part := range cut(f) {
						f.send(part)
					}
					if err := f.complete(); err != nil {
						t.Error(err)
					}
					data := slices.Concat(f.seal(recordApplicationData, []byte("hello, ")), f.seal(recordApplicationData, []byte("world")),
						f.seal(recordAlert, []byte{levelWarning, 0}))
					for i := range data {
						f.send(data[i : i+1])
					}
				})
				got, err := io.ReadAll(c)
				if string(got) != "hello, world" || err != nil {
					t.Errorf("%q, %v", got, err)
				}
				wait()
			}
			size := 0
			transfer(func(f *fake) [][]byte {
				flight := f.flight(nil)
				size = len(flight)
				return slices.Collect(slices.Chunk(flight, 1))
			})
			for at := 1; at < size; at++ {
				transfer(func(f *fake) [][]byte {
					flight := f.flight(nil)
					return [][]byte{flight[:at], flight[at:]}
				})
			}
			for _, piece := range []int{1, 2, 3, 5, 7} { // handshake records of that many bytes
				transfer(func(f *fake) [][]byte {
					var parts [][]byte
					for part := range slices.Chunk(f.answer(nil), piece) {
						parts = append(parts, f.seal(recordHandshake, part))
					}
					parts = append(parts, f.ccs())
					for part := range slices.Chunk(f.finished(), piece) {
						parts = append(parts, f.seal(recordHandshake, part))
					}
					return parts
				})
			}
		})
	}
}

// TestClientHello: the ClientHello is that of crypto/tls, without session_ticket
// and what belongs to TLS 1.3 or to certificates.
func TestClientHello(t *testing.T) {
	for _, cfg := range []*tls.Config{
		plainConfig(), plainConfig("h2", "http/1.1"),
		{ServerName: testName, InsecureSkipVerify: true},
		{ServerName: "10.0.0.1", InsecureSkipVerify: true},
		{InsecureSkipVerify: true},
		{ServerName: "Example.Test.", InsecureSkipVerify: true, CipherSuites: []uint16{gcm128}, CurvePreferences: []tls.CurveID{tls.CurveP384}},
	} {
		c, wait := against(t, Config{Session: sessionOf(gcm128, true), Config: cfg}, func(f *fake) { f.send(f.flight(nil)); _ = f.complete() })
		if err := c.Handshake(); err != nil {
			t.Fatal(err)
		}
		f := wait()
		own := cfg.Clone()
		own.MaxVersion, own.ClientSessionCache = tls.VersionTLS12, tls.NewLRUClientSessionCache(1)
		var heard listener
		_ = tls.Client(&heard, own).Handshake()
		theirs, err := ParseHello(heard.sent[headerSize:])
		if err != nil {
			t.Fatal(err)
		}
		ours, err := ParseHello(f.clientHello)
		if err != nil {
			t.Fatal(err)
		}
		if fmt.Sprint(ours) != fmt.Sprint(theirs) {
			t.Errorf("ours   %v\ntheirs %v", ours, theirs)
		}
		if !slices.Contains(ours.suites, gcm128) || slices.Contains(ours.suites, tls.TLS_AES_128_GCM_SHA256) || slices.Contains(ours.suites, 0x5600) {
			t.Errorf("suites %x", ours.suites)
		}
		id := f.clientHello[messageHeader+2+randomSize+1:][:32]
		if !bytes.Equal(id, f.session.ID) {
			t.Errorf("session ID %x, not %x", id, f.session.ID)
		}
		if bytes.Contains(f.clientHello, []byte{0, extensionSessionTicket, 0, 0}) {
			t.Error("session_ticket is sent")
		}
	}
}

func TestParseHello(t *testing.T) {
	var heard listener
	_ = tls.Client(&heard, &tls.Config{ServerName: testName, NextProtos: []string{"h2"}}).Handshake()
	message := heard.sent[headerSize:]
	hello, err := ParseHello(message)
	if err != nil {
		t.Fatal(err)
	}
	if hello.serverName != testName || !slices.Equal(hello.protocols, []string{"h2"}) {
		t.Errorf("%q, %q", hello.serverName, hello.protocols)
	}
	for _, kind := range []uint16{5, 18, extensionSessionTicket, 43, 45, 51} {
		if hello.has(kind) {
			t.Errorf("extension %d is kept", kind)
		}
	}
	for n := range message {
		if _, err := ParseHello(message[:n]); err == nil {
			t.Fatalf("%d bytes of %d are taken", n, len(message))
		}
	}
	if _, err := ParseHello(append(bytes.Clone(message), 0)); err == nil {
		t.Error("a byte more is taken")
	}
}

// What can't be resumed is refused before anything is sent.
func TestImpossible(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"no ID":           func(c *Config) { c.Session.ID = nil },
		"long ID":         func(c *Config) { c.Session.ID = make([]byte, 33) },
		"no secret":       func(c *Config) { c.Session.Secret = nil },
		"CBC":             func(c *Config) { c.Session.CipherSuite = tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA },
		"TLS 1.3 suite":   func(c *Config) { c.Session.CipherSuite = tls.TLS_AES_128_GCM_SHA256 },
		"suite forbidden": func(c *Config) { c.Config.CipherSuites = []uint16{tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256} },
		"TLS 1.3 only":    func(c *Config) { c.Config.MinVersion, c.Config.MaxVersion = tls.VersionTLS13, 0 },
		"TLS 1.1 only":    func(c *Config) { c.Config.MinVersion, c.Config.MaxVersion = 0, tls.VersionTLS11 },
		"no name":         func(c *Config) { c.Config.InsecureSkipVerify, c.Config.ServerName = false, "" },
		"no config":       func(c *Config) { c.Config = nil },
		"Hello of another name": func(c *Config) {
			c.Hello, _ = HelloOf(&tls.Config{ServerName: "other.test", InsecureSkipVerify: true})
		},
		"Hello of another protocol": func(c *Config) { c.Hello, _ = HelloOf(plainConfig("h2")) },
		"Hello of another suite": func(c *Config) {
			other := plainConfig()
			other.CipherSuites = []uint16{tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256}
			c.Hello, _ = HelloOf(other)
		},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := Config{Session: sessionOf(gcm128, true), Config: plainConfig()}
			change(&cfg)
			sent := listener{}
			if err := Client(&sent, cfg).Handshake(); err == nil {
				t.Error("no error")
			}
			if len(sent.sent) > 0 {
				t.Errorf("%d bytes were sent", len(sent.sent))
			}
		})
	}
}

func TestSupports(t *testing.T) {
	for _, suite := range tls.CipherSuites() {
		want := slices.Contains(suite.SupportedVersions, tls.VersionTLS12) && !strings.Contains(suite.Name, "CBC")
		if Supports(suite.ID) != want {
			t.Errorf("%s: %t", suite.Name, !want)
		}
	}
}

// VerifyConnection decides before the client's Finished is sent.
func TestVerifyConnection(t *testing.T) {
	refusal := errors.New("no")
	leaf := &x509.Certificate{Raw: []byte{1}}
	for _, verdict := range []error{nil, refusal} {
		cfg := Config{Session: sessionOf(gcm128, true), Config: plainConfig("h2")}
		cfg.Session.PeerCertificates, cfg.Session.VerifiedChains = []*x509.Certificate{leaf}, [][]*x509.Certificate{{leaf}}
		calls := 0
		cfg.Config.VerifyConnection = func(state tls.ConnectionState) error {
			calls++
			if !state.DidResume || state.HandshakeComplete || state.Version != tls.VersionTLS12 || state.NegotiatedProtocol != "h2" ||
				len(state.PeerCertificates) != 1 || len(state.VerifiedChains) != 1 {
				t.Errorf("%+v", state)
			}
			return verdict
		}
		c, wait := against(t, cfg, func(f *fake) {
			f.send(f.flight(with(extensionALPN, 0, 3, 2, 'h', '2')))
			if verdict == nil {
				_ = f.complete()
			}
		})
		if err := c.Handshake(); err != verdict || calls != 1 {
			t.Errorf("%v, want %v; %d calls", err, verdict, calls)
		}
		f := wait()
		if got := f.alerts(); verdict != nil && !slices.Equal(got, []tls.AlertError{alertBadCertificate}) {
			t.Errorf("alerts %v", got)
		}
	}
}

// A stalled server costs no longer than ctx allows.
func TestHandshakeContext(t *testing.T) {
	cfg := Config{Session: sessionOf(gcm128, true), Config: plainConfig()}
	stalled := make(chan struct{})
	c, wait := against(t, cfg, func(f *fake) {
		f.send(f.flight(nil)[:50])
		<-stalled
	})
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(20*time.Millisecond, cancel)
	if err := c.HandshakeContext(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	close(stalled)
	wait()
}

// The secret is wiped whatever becomes of the handshake, and the caller's copy is
// left alone.
func TestSecretIsWiped(t *testing.T) {
	for name, end := range map[string]func(*Conn) error{
		"completed": func(c *Conn) error { return c.Handshake() },
		"closed":    func(c *Conn) error { return c.Close() },
	} {
		cfg := Config{Session: sessionOf(gcm128, true), Config: plainConfig()}
		c, wait := against(t, cfg, func(f *fake) { f.send(f.flight(nil)); _ = f.complete() })
		copied := c.cfg.Session.Secret
		if bytes.Equal(copied, make([]byte, secretSize)) {
			t.Fatal("no secret")
		}
		if err := end(c); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if !bytes.Equal(copied, make([]byte, secretSize)) || c.cfg.Session.Secret != nil {
			t.Errorf("%s: the secret is not wiped", name)
		}
		if bytes.Equal(cfg.Session.Secret, make([]byte, secretSize)) {
			t.Errorf("%s: the caller's secret is gone", name)
		}
		wait()
	}
}
