package trust

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func testEnvelope(t testing.TB, fill byte) *envelope {
	t.Helper()
	e, err := newEnvelope(bytes.Repeat([]byte{fill}, keySize))
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestEnvelopeProperties(t *testing.T) {
	e := testEnvelope(t, 1)
	rapid.Check(t, func(t *rapid.T) {
		plaintext := rapid.SliceOf(rapid.Byte()).Draw(t, "plaintext")
		context := rapid.SliceOf(rapid.Byte()).Draw(t, "context")
		sealed, err := e.seal(plaintext, context)
		if err != nil {
			t.Fatal(err)
		}
		if len(sealed) != sealedOverhead+len(plaintext) {
			t.Fatalf("%d bytes sealed are %d", len(plaintext), len(sealed))
		}
		if got, err := e.unseal(sealed, context); err != nil || !bytes.Equal(got, plaintext) {
			t.Fatalf("%x, %v", got, err)
		}
		if _, err := e.unseal(sealed, append(bytes.Clone(context), 0)); !errors.Is(err, ErrSealed) {
			t.Fatalf("another context: %v", err)
		}
		sealed[rapid.IntRange(0, len(sealed)-1).Draw(t, "at")] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		if _, err := e.unseal(sealed, context); !errors.Is(err, ErrSealed) && !errors.Is(err, ErrKEK) {
			t.Fatalf("changed value: %v", err)
		}
	})
}

func TestEnvelopeKeys(t *testing.T) {
	plaintext, context := bytes.Repeat([]byte("secret"), 10), []byte("a")
	one, other := testEnvelope(t, 1), testEnvelope(t, 2)
	first, err := one.seal(plaintext, context)
	if err != nil {
		t.Fatal(err)
	}
	second, err := one.seal(plaintext, context)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(first[headerSize:], second[headerSize:]) || bytes.Contains(first, plaintext[:6]) {
		t.Error("equal values look equal, or are not encrypted")
	}
	if _, err := other.unseal(first, context); !errors.Is(err, ErrKEK) || !strings.Contains(err.Error(), "sealed with key") {
		t.Errorf("another key: %v", err)
	}
	// A value of the other key can't be passed off as one of this key.
	forged := bytes.Clone(first)
	copy(forged[len(envelopeMagic)+1:], other.id[:])
	if _, err := other.unseal(forged, context); !errors.Is(err, ErrSealed) {
		t.Errorf("forged id: %v", err)
	}
	// Nor can parts of two values be put together.
	mixed := append(bytes.Clone(first[:headerSize+wrappedSize]), second[headerSize+wrappedSize:]...)
	if _, err := one.unseal(mixed, context); !errors.Is(err, ErrSealed) {
		t.Errorf("mixed parts: %v", err)
	}
}

func TestSealBeforeOpen(t *testing.T) {
	trust := New(Config{})
	if _, err := trust.Seal(nil, nil); !errors.Is(err, ErrNotOpen) {
		t.Error(err)
	}
	if _, err := trust.Unseal(nil, nil); !errors.Is(err, ErrNotOpen) {
		t.Error(err)
	}
}

func FuzzUnseal(f *testing.F) {
	e := testEnvelope(f, 1)
	f.Add([]byte(nil), []byte(nil))
	f.Add([]byte(envelopeMagic), []byte("x"))
	f.Add(append(append([]byte(envelopeMagic), envelopeVersion), make([]byte, 200)...), []byte("x"))
	f.Fuzz(func(t *testing.T, sealed, context []byte) {
		if plaintext, err := e.unseal(sealed, context); err == nil {
			t.Fatalf("invented value unsealed as %x", plaintext)
		}
	})
}
