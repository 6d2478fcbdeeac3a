package probe

import (
	"crypto/tls"
	"fmt"
	"slices"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

var curveIDs = map[string]tls.CurveID{
	"X25519":         tls.X25519,
	"P256":           tls.CurveP256,
	"P384":           tls.CurveP384,
	"P521":           tls.CurveP521,
	"X25519MLKEM768": tls.X25519MLKEM768,
}

var versionIDs = map[resealv1.TLSVersion]uint16{
	resealv1.TLSVersion_TLS_VERSION_TLS1_2: tls.VersionTLS12,
	resealv1.TLSVersion_TLS_VERSION_TLS1_3: tls.VersionTLS13,
}

// baseTLS is what all handshakes of a probe have in common.
func baseTLS(cfg Config) (*tls.Config, error) {
	base := &tls.Config{}
	if cfg.TLS != nil {
		base = cfg.TLS.Clone()
	} else {
		base.RootCAs, base.Certificates, base.InsecureSkipVerify = cfg.Roots, cfg.Certificates, cfg.InsecureSkipVerify
		if err := applyPolicy(base, cfg.Policy.WithDefaults()); err != nil {
			return nil, err
		}
	}
	base.ServerName = cfg.ServerName
	base.MinVersion = max(base.MinVersion, tls.VersionTLS12)
	if base.MaxVersion == 0 || base.MaxVersion > tls.VersionTLS13 {
		base.MaxVersion = tls.VersionTLS13
	}
	if base.MinVersion > base.MaxVersion {
		return nil, fmt.Errorf("the TLS policy's minVersion %s is above its maxVersion %s",
			tls.VersionName(base.MinVersion), tls.VersionName(base.MaxVersion))
	}
	base.ClientSessionCache, base.SessionTicketsDisabled = nil, false
	return base, nil
}

// applyPolicy sets what a policy with defaults says about client handshakes.
func applyPolicy(base *tls.Config, policy *resealv1.TLSPolicy) error {
	var ok bool
	if base.MinVersion, ok = versionIDs[policy.MinVersion]; !ok {
		return fmt.Errorf("the TLS policy's minVersion has the unknown value %d", policy.MinVersion)
	}
	if base.MaxVersion, ok = versionIDs[policy.MaxVersion]; !ok {
		return fmt.Errorf("the TLS policy's maxVersion has the unknown value %d", policy.MaxVersion)
	}
	known := slices.Concat(tls.CipherSuites(), tls.InsecureCipherSuites())
	for _, name := range policy.CipherSuites {
		i := slices.IndexFunc(known, func(suite *tls.CipherSuite) bool { return suite.Name == name })
		if i < 0 {
			return fmt.Errorf("the TLS policy's cipher suite %q is not known", name)
		}
		base.CipherSuites = append(base.CipherSuites, known[i].ID)
	}
	for _, name := range policy.Curves {
		curve, ok := curveIDs[name]
		if !ok {
			return fmt.Errorf("the TLS policy's curve %q is not known", name)
		}
		base.CurvePreferences = append(base.CurvePreferences, curve)
	}
	return nil
}

// versionOf is a version number as the protocol names it, or unspecified for
// versions that it has no name for.
func versionOf(number uint16) resealv1.TLSVersion {
	for name, id := range versionIDs {
		if id == number {
			return name
		}
	}
	return resealv1.TLSVersion_TLS_VERSION_UNSPECIFIED
}
