package abbreviated

import (
	"bytes"
	"io"
	"testing"
)

// TestBoGo goes through BoringSSL's test suite (ssl/test/runner): all its cases of
// a TLS client that resumes and whose version may be 1.2, by name. A star stands
// for what varies a case without a meaning here: versions below, I/O styles.
// Each is played by the fake server, or is not this package's business and says
// why.
func TestBoGo(t *testing.T) {
	base := Config{Session: sessionOf(gcm128, true), Config: plainConfig("foo", "bar")}
	// resumes is a case in which the server resumes, by a flight as given.
	resumes := func(cfg Config, flight func(f *fake) []byte) func(*testing.T) {
		return func(t *testing.T) {
			c, wait := against(t, cfg, func(f *fake) {
				f.send(flight(f))
				if err := f.complete(); err != nil {
					t.Error(err)
				}
				f.send(f.seal(recordApplicationData, []byte("data")), f.seal(recordAlert, []byte{levelWarning, 0}))
			})
			defer wait()
			if got, err := io.ReadAll(c); string(got) != "data" || err != nil || !c.ConnectionState().DidResume {
				t.Errorf("%q, %v", got, err)
			}
		}
	}
	with := func(change func(*answer)) func(*testing.T) {
		return resumes(base, func(f *fake) []byte { return f.flight(change) })
	}
	// fails is a case in which the attempt ends.
	fails := func(deviation string) func(*testing.T) {
		return func(t *testing.T) {
			test, ok := deviations[deviation]
			if !ok {
				t.Fatalf("no deviation %q", deviation)
			}
			c, wait := against(t, base, test.serve)
			checkFailure(t, c, wait, test)
		}
	}
	suite := func(id uint16) func(*testing.T) {
		return resumes(Config{Session: sessionOf(id, true), Config: plainConfig()}, func(f *fake) []byte { return f.flight(nil) })
	}
	short := base
	short.Session.ID = []byte{7}
	legacy := base
	legacy.Session.ExtendedMasterSecret = false
	const (
		full      = "it is about the full handshake, which is crypto/tls's"
		older     = "TLS 1.0 and 1.1 are not spoken"
		newer     = "TLS 1.3 is crypto/tls's"
		cbc       = "CBC suites are not supported: crypto/tls makes a full handshake"
		psk       = "PSK suites are not supported"
		elsewhere = "its extension is never offered"
		style     = "it is about the test program's API"
	)
	for _, test := range []struct {
		name string
		run  func(*testing.T)
		skip string
	}{
		{"Resume-Client-TLS12-TLS12-TLS", with(nil), ""},
		{"Resume-Client-NoResume-TLS12-TLS12-TLS", fails("no session ID"), ""},
		{"Resume-Client-Mismatch-TLS12-TLS11-TLS", fails("TLS 1.1"), ""},
		{"Resume-Client-Mismatch-TLS12-TLS1-TLS", fails("TLS 1.0"), ""},
		{"Resume-Client-Mismatch-TLS12-TLS13-TLS", fails("TLS 1.3 in supported_versions"), ""},
		{"Resume-Client-NoResume-TLS12-TLS11-TLS", fails("TLS 1.1"), ""},
		{"Resume-Client-NoResume-TLS12-TLS1-TLS", fails("TLS 1.0"), ""},
		{"Resume-Client-NoResume-TLS12-TLS13-TLS", fails("TLS 1.3 in supported_versions"), ""},
		{"Resume-Client-*-TLS13-*", nil, newer},
		{"Resume-Client-*-TLS1-*, Resume-Client-*-TLS11-*", nil, older},
		{"Resume-Client-CipherMismatch", fails("another suite"), ""},
		{"Resume-Client-CipherMismatch-TLS13, Resume-Client-PRFMismatch-TLS13", nil, newer},
		{"ExtendedMasterSecret-YesToYes-Client", with(nil), ""},
		{"ExtendedMasterSecret-YesToNo-Client", fails("no EMS"), ""},
		{"ExtendedMasterSecret-NoToNo-Client", resumes(legacy, func(f *fake) []byte { return f.flight(nil) }), ""},
		{"ExtendedMasterSecret-NoToYes-Client", func(t *testing.T) {
			c, wait := against(t, legacy, func(f *fake) {
				f.send(f.flight(func(a *answer) { a.extensions = append(a.extensions, extension{extensionExtendedMasterSecret, nil}) }))
			})
			checkFailure(t, c, wait, deviation{alert: alertHandshakeFailure})
		}, ""},
		{"Client-ShortSessionID", resumes(short, func(f *fake) []byte { return f.flight(nil) }), ""},
		{"Client-TooLongSessionID", fails("an ID of 33 bytes"), ""},
		{"FragmentAcrossChangeCipherSpec-Client-Resume", fails("a fragment before ChangeCipherSpec"), ""},
		{"FragmentAcrossChangeCipherSpec-Client-Resume-Packed", fails("a fragment before ChangeCipherSpec"), ""},
		{"TrailingDataWithFinished-Resume-Client-TLS12", fails("Finished and more"), ""},
		{"TrailingDataWithFinished-Resume-Client-TLS1*", nil, older},
		{"StrayChangeCipherSpec", fails("ChangeCipherSpec first"), ""},
		{"BadChangeCipherSpec-1", fails("ChangeCipherSpec of 0"), ""},
		{"BadChangeCipherSpec-2", fails("ChangeCipherSpec of two bytes"), ""},
		{"SkipChangeCipherSpec-Client", fails("no ChangeCipherSpec"), ""},
		{"ExtraHandshake-Client-TLS12", nil, "a second ServerHello is refused: see TestBadRecords"},
		{"Basic-Client-TLS-*", with(nil), ""},
		{"Basic-Client-NoTicket-TLS-*", with(nil), ""},
		{"Basic-Client-RenewTicket-TLS-*", fails("session_ticket unasked"), ""},
		{"TLS12-NoTicket-NoOffer", nil, "the client there offers no ID; here one is offered always"},
		{"TLS1-NoTicket-NoOffer, TLS11-NoTicket-NoOffer", nil, older},
		{"ALPNClient-TLS-TLS12", with(func(a *answer) {
			a.extensions = append(a.extensions, extension{extensionALPN, []byte{0, 4, 3, 'f', 'o', 'o'}})
		}), ""},
		{"TolerateServerNameAck-TLS-TLS12", with(func(a *answer) { a.extensions = append(a.extensions, extension{extensionServerName, nil}) }), ""},
		{"ALPNClient-*-TLS1*, TolerateServerNameAck-*-TLS1*", nil, older},
		{"ALPS-Reject-Client-Resume-New-TLS-TLS12", fails("an unknown extension"), ""},
		{"ALPS-Reject-Client-Resume-Old-TLS-TLS12", fails("an unknown extension"), ""},
		{"SendSCTListOnResume-TLS-TLS12", fails("signed_certificate_timestamp"), ""},
		{"SendOCSPResponseOnResume-TLS12", fails("status_request"), ""},
		{"SignedCertificateTimestampList-Client-TLS-TLS12", with(nil), ""},
		{"OCSPStapling-Client-TLS12-TLS-*", with(nil), ""},
		{"AllExtensions-Client-Permute-TLS-TLS12", nil, "the order of extensions is crypto/tls's"},
		{"Renegotiate-Client*", nil, "there is no renegotiation: see TestHelloRequest"},
		{"TLS-TLS12-*_WITH_AES_128_GCM_SHA256-client", suite(gcm128), ""},
		{"TLS-TLS12-*_WITH_AES_256_GCM_SHA384-client", suite(0xc030), ""},
		{"TLS-TLS12-*_WITH_CHACHA20_POLY1305_SHA256-client", suite(0xcca8), ""},
		{"TLS-TLS12-*_CBC_SHA-client, TLS-TLS12-*_CBC_SHA256-client, CBCRecordSplitting*", nil, cbc},
		{"TLS-TLS12-PSK_*, TLS-TLS12-ECDHE_PSK_*, PSK-Client-*", nil, psk},
		{"TLS-TLS12-AES_128_GCM_SHA256-client", fails("a suite of TLS 1.3"), ""},
		{"CertificateVerificationDoesNotFailOnResume-Client-TLS12-*", with(nil), ""},
		{"CertificateVerificationFailsOnResume-Client-TLS12-CustomCallback-*", nil, "VerifyConnection is called: see TestVerifyConnection"},
		{"CertificateVerificationPassesOnResume-Client-TLS12-CustomCallback-*", nil, "VerifyConnection is called: see TestVerifyConnection"},
		{"CertificateVerificationSucceed-Client-TLS12-*, CertificateVerificationSoftFail-TLS12-*", nil, full},
		{"Client-Verify-*, Client-VerifyDefault-*", nil, full},
		{"ClientCertificateType-Client-*, ServerCertificateType-Client-*", nil, full},
		{"FalseStart-*, FalseStart-ALPN-*", nil, full},
		{"NPN-Client-*, ChannelID-*", nil, elsewhere},
		{"TLS-ECH-Client-*", nil, elsewhere},
		{"CurveID-Resume-Client, ExportKeyingMaterial-TLS-TLS12", nil, "ConnectionState does not tell it"},
		{"TLSUnique-Resume-EMS-Client, TLSUnique-Resume-NoEMS-Client", nil, "ConnectionState does not tell it"},
		{"*-TLS-Async*, *-ImplicitHandshake, *-PackHandshake, *-SplitHandshakeRecords", nil, style + "; packets and records are cut in TestSplits"},
	} {
		t.Run(test.name, func(t *testing.T) {
			switch {
			case test.run != nil && test.skip == "":
				test.run(t)
			case test.run != nil || test.skip == "":
				t.Error("a case is either played or has a reason not to be")
			}
		})
	}
	if bytes.Equal(base.Session.Secret, make([]byte, secretSize)) {
		t.Error("the sessions' secret is gone")
	}
}
