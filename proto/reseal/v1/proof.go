package resealv1

import "strings"

// ComeBackProof is what an edge signs whose certificate has expired, to get another
// one for a certificate request (ExpiredCertificate).
func ComeBackProof(certificateRequest []byte) []byte {
	return append([]byte(strings.Repeat(" ", 64)+"Reseal, an edge comes back\x00"), certificateRequest...)
}
